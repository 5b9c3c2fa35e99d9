import hashlib
import os
import sys
import threading
import types

import pytest
import torch
from safetensors.torch import load_file, save

from loopback_site import CONTENT, Site
from lorabook.lora import download as address
from lorabook.lora.download import fetch_adapter
from lorabook.lora.files import shareable_address
from lorabook.lora.find import hub_file
from lorabook.lora.source import find_adapter, sha256_of

TOKEN = "civ-SecretTokenForTests"
PAGE = b"<!DOCTYPE html><html><body>Log in</body></html>"


@pytest.fixture
def site():
    with Site() as site:
        yield site


@pytest.fixture
def other():
    with Site() as other:
        yield other


@pytest.fixture
def civitai(site, monkeypatch):
    """The site of the tests is CivitAI."""
    monkeypatch.setattr(address, "CIVITAI", ("127.0.0.1",))
    for name in address.CIVITAI_NAMES:
        monkeypatch.delenv(name, raising=False)
    return site


def left_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def sent_token(request):
    return request[1].get("Authorization")


def test_a_file_comes_under_the_name_that_the_site_gives_it(site, tmp_path):
    url = site.give("/api/download/models/15603?type=Model", name="ink drawing v1.0.safetensors")
    path = fetch_adapter(url, cache_dir=tmp_path)
    assert path.name == "ink drawing v1.0.safetensors" and path.read_bytes() == CONTENT
    assert left_in(tmp_path) == [path.name]


def test_without_a_name_from_the_site_the_address_gives_it(site, tmp_path):
    assert (
        fetch_adapter(site.give("/loras/ink.safetensors?x=1"), cache_dir=tmp_path).name
        == "ink.safetensors"
    )
    assert fetch_adapter(site.give("/models/15603"), cache_dir=tmp_path).name == "15603.safetensors"


def test_a_name_in_another_alphabet_is_kept(site, tmp_path):
    headers = {"Content-Disposition": "attachment; filename*=UTF-8''%E5%A2%A8%20ink.safetensors"}
    assert (
        fetch_adapter(site.give("/a", **headers), cache_dir=tmp_path).name == "墨 ink.safetensors"
    )


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../x.safetensors", "x.safetensors"),
        ("/etc/x.safetensors", "x.safetensors"),
        ("..", "adapter.safetensors"),
        (r"..\\..\\x.safetensors", "x.safetensors"),
        ("a:b*c.SAFETENSORS", "a_b_c.safetensors"),
        (".part", "part.safetensors"),
        ("y" * 300 + ".safetensors", "y" * 150 + ".safetensors"),
        ("x.safetensors.part", "x.safetensors.part.safetensors"),
    ],
)
def test_a_name_never_climbs_out_of_the_cache(site, tmp_path, name, kept):
    path = fetch_adapter(site.give("/a", name=name), cache_dir=tmp_path / "cache")
    assert path.name == kept and path.is_relative_to(tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_second_call_asks_nothing_and_works_without_network(tmp_path):
    with Site() as site:
        url = site.give("/a.safetensors")
        first = fetch_adapter(url, cache_dir=tmp_path)
    assert fetch_adapter(url, cache_dir=tmp_path) == first and len(site.requests) == 1
    assert fetch_adapter(url, cache_dir=tmp_path, local_files_only=True) == first


def test_other_addresses_are_other_files_but_for_a_token(site, tmp_path):
    site.give("/a?version=1", name="same.safetensors")
    site.give("/a?version=2", save({"x": torch.ones(1)}), name="same.safetensors")
    site.give("/a?version=1&token=b", name="same.safetensors")
    paths = [
        fetch_adapter(f"{site.url}/a?version={end}", cache_dir=tmp_path)
        for end in ("1", "2", "1&token=b")
    ]
    assert paths[0] == paths[2] != paths[1] and len(site.requests) == 2


def test_the_cache_is_below_the_users_cache_folder(site):
    path = fetch_adapter(site.give("/a.safetensors"))
    assert path.is_relative_to(os.environ["XDG_CACHE_HOME"] + "/lorabook/adapters")


def test_what_is_not_in_the_cache_is_not_fetched_with_local_files_only(site, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="a.safetensors is not in the cache .* fetch it once"
    ):
        fetch_adapter(site.give("/a.safetensors"), cache_dir=tmp_path, local_files_only=True)
    assert not site.requests


def test_two_at_once_fetch_one_file(site, tmp_path):
    url, found, site.pause = site.give("/a.safetensors"), [], 0.1
    threads = [
        threading.Thread(target=lambda: found.append(fetch_adapter(url, cache_dir=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(site.requests) == 1


@pytest.mark.parametrize("size", [0, 4, 10_000])
def test_a_download_that_breaks_off_leaves_nothing_and_starts_anew(site, tmp_path, size):
    url, site.sent = site.give("/a.safetensors"), size
    with pytest.raises(FileNotFoundError, match=f"a.safetensors broke off after {size:,} of 20,"):
        fetch_adapter(url, cache_dir=tmp_path)
    assert not left_in(tmp_path)
    site.sent = None
    assert fetch_adapter(url, cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_download_of_unknown_size_that_breaks_off_is_noticed(site, tmp_path):
    with pytest.raises(ValueError, match="gave no safetensors file"):
        fetch_adapter(
            site.give("/a.safetensors", CONTENT[:9000], **{"Content-Length": None}),
            cache_dir=tmp_path,
        )
    assert not left_in(tmp_path)


def test_what_a_killed_download_left_is_not_taken_for_an_adapter(site, tmp_path):
    url = site.give("/a.safetensors")
    path = fetch_adapter(url, cache_dir=tmp_path)
    path.rename(path.with_name(path.name + ".part")).write_bytes(CONTENT[:100])
    assert fetch_adapter(url, cache_dir=tmp_path).read_bytes() == CONTENT and left_in(tmp_path) == [
        path.name
    ]


def test_ctrl_c_leaves_nothing(site, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(address.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch_adapter(site.give("/a.safetensors"), cache_dir=tmp_path)
    assert not left_in(tmp_path)


def test_a_site_out_of_reach_is_named(tmp_path):
    with Site() as gone:
        url = gone.give("/a.safetensors")
    with pytest.raises(
        FileNotFoundError, match="a.safetensors cannot be reached, or broke off: .*refused"
    ):
        fetch_adapter(url, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "status, match",
    [
        (404, "no such file .404.*copy the link"),
        (500, "answered 500; try again"),
        (429, "answered 429"),
    ],
)
def test_a_site_that_gives_nothing_is_named(site, tmp_path, status, match):
    with pytest.raises(FileNotFoundError, match=match):
        fetch_adapter(site.give("/a", status=status), cache_dir=tmp_path)
    assert not left_in(tmp_path)


def test_a_login_page_is_not_an_adapter(civitai, tmp_path):
    civitai.give("/login?reason=download-auth", PAGE)
    with pytest.raises(ValueError, match="gave a web page, not a file.*CIVITAI_TOKEN"):
        fetch_adapter(
            civitai.send_on("/api/download/models/1", "/login?reason=download-auth"),
            cache_dir=tmp_path,
        )
    assert not left_in(tmp_path)


@pytest.mark.parametrize("body", [b"", b'{"error":"Unauthorized"}', b"PK\x03\x04" + bytes(100)])
def test_what_is_no_adapter_file_is_not_kept(site, tmp_path, body):
    with pytest.raises(ValueError, match="/a.zip gave no safetensors file.*browser"):
        fetch_adapter(site.give("/a.zip", body), cache_dir=tmp_path)
    assert not left_in(tmp_path)


def test_an_adapter_whose_first_byte_looks_like_a_page_is_kept(site, tmp_path):
    size = int.from_bytes(CONTENT[:8], "little")
    header = CONTENT[8 : 8 + size].ljust(256 + ord("<"))
    body = len(header).to_bytes(8, "little") + header + CONTENT[8 + size :]
    assert (
        body[:1] == b"<"
        and fetch_adapter(site.give("/a", body), cache_dir=tmp_path).read_bytes() == body
    )


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt", ".PTH"])
def test_a_pickle_is_refused_by_its_name_before_it_comes(site, tmp_path, ending):
    url = site.give("/a", name=f"lora{ending}")
    with pytest.raises(
        ValueError, match=f"/a is a pickle file .lora{ending.lower()}.*allow_pickle=True"
    ):
        fetch_adapter(url, cache_dir=tmp_path)
    assert not left_in(tmp_path)


def test_a_pickle_that_is_allowed_comes_and_is_refused_later_where_it_is_not(site, tmp_path):
    url = site.give("/a", b"\x80\x02weights", name="lora.pt")
    assert fetch_adapter(url, cache_dir=tmp_path, allow_pickle=True).name == "lora.pt"
    with pytest.raises(ValueError, match="is a pickle file"):
        fetch_adapter(url, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.safetensors",
        "http://127.0.0.1.example.org/a",
        "ftp://localhost/a",
        "file:///etc/passwd",
    ],
)
def test_only_https_is_fetched_from_elsewhere(url, tmp_path):
    with pytest.raises(ValueError, match="only https addresses|not a web address"):
        fetch_adapter(url, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "url", ["https://", "https://[::1/a", "https://site:port/a", "a.safetensors"]
)
def test_what_is_no_address_is_an_error(url, tmp_path):
    with pytest.raises(ValueError, match="is not a web address; give https"):
        fetch_adapter(url, cache_dir=tmp_path)


def test_a_password_in_an_address_is_refused_and_not_shown(tmp_path):
    with pytest.raises(ValueError, match="^https://site.org/a: give token=") as told:
        fetch_adapter("https://me:hunter2@site.org/a", cache_dir=tmp_path)
    assert "hunter2" not in str(told.value)


SECRET = "civ-SecretOfATest"


@pytest.mark.parametrize(
    "address, shown",
    [
        (
            f"https://civitai.com/api/download/models/1?type=Model&token={SECRET}",
            "https://civitai.com/api/download/models/1",
        ),
        (f"https://site.org/a.safetensors#key={SECRET}", "https://site.org/a.safetensors"),
        (f"https://me:{SECRET}@site.org/a", "https://site.org/a"),
        (f"HTTPS://{SECRET}@site.org/a@b", "HTTPS://site.org/a@b"),
        (f"https:/site.org/a?token={SECRET}", "https:/site.org/a"),
        (f"civitai.com/api/1?token={SECRET}", "civitai.com/api/1"),
        (f"https://site.org?token={SECRET}/x", "https://site.org"),
        ("someone/ink", "someone/ink"),
        ("~/a#1.safetensors", "~/a#1.safetensors"),
        ("C:\\loras\\what?.safetensors", "C:\\loras\\what?.safetensors"),
        ("C:/loras/a#b", "C:/loras/a#b"),
    ],
)
def test_an_address_is_kept_and_shown_without_user_query_and_fragment(address, shown):
    assert shareable_address(address) == shown


@pytest.mark.parametrize(
    "end", [f"?token={SECRET}", f"?type=Model&api_key={SECRET}", f"#token={SECRET}"]
)
def test_no_secret_of_an_address_is_kept_or_said(pipe, site, tmp_path, end):
    import lorabook as lb
    from lorabook.live.inject import source_of

    body = (lb.bundled("adapters/ink") / "pytorch_lora_weights.safetensors").read_bytes()
    url = (
        site.give("/api/1" + end.partition("#")[0], body, name="ink.safetensors")
        .partition("?")[0]
        .partition("#")[0]
        + end
    )
    report = lb.load_adapter(pipe, url, "ink", cache_dir=str(tmp_path))
    assert source_of(pipe, "ink") == f"{site.url}/api/1"
    assert SECRET not in str(report) + report._repr_html_() + str(
        vars(pipe.unet.peft_config["ink"])
    )
    assert SECRET not in str(lb.inspect_adapter(url, cache_dir=str(tmp_path)))
    assert (
        lb.inspect_adapter(f"{site.url}/api/1", cache_dir=str(tmp_path)).sha256 == report.sha256
    )  # from the cache
    assert (
        lb.inspect_adapter(
            f"{site.url}/api/1", cache_dir=str(tmp_path), local_files_only=True
        ).sha256
        == report.sha256
    )


@pytest.mark.parametrize(
    "find", [{"weight_name": "../x"}, {"subfolder": "/x"}, {"local_files_only": True}]
)
@pytest.mark.parametrize(
    "start",
    [
        "http://127.0.0.1:9/a",
        "https://[::1/a",
        "https://me:pw@site.org/a",
        "https:/site.org/a",
        "site.org/a",
        "ftp://site.org/a",
    ],
)
def test_no_error_says_what_stands_behind_the_question_mark(start, find, tmp_path):
    from lorabook import base_model_of, inspect_adapter

    calls = [lambda url: inspect_adapter(url, **find)]
    calls += [lambda url: base_model_of(url, cache_dir=str(tmp_path), local_files_only=True)]
    for call in calls:
        with pytest.raises((ValueError, FileNotFoundError)) as told:
            call(f"{start}?token={SECRET}")
        assert SECRET not in str(told.value) and ":pw" not in str(told.value)


def test_an_adapter_that_names_no_base_model_is_named_without_its_query(site, tmp_path):
    from lorabook import base_model_of

    with pytest.raises(ValueError, match=f"adapter {site.url}/a does not say") as told:
        base_model_of(site.give(f"/a?token={SECRET}"), cache_dir=str(tmp_path))
    assert SECRET not in str(told.value)


def test_an_address_without_its_query_is_asked_for_and_else_stands_for_the_one_file_fetched_with_it(
    site, tmp_path
):
    other = save({"x": torch.ones(1)})
    first = fetch_adapter(site.give("/a?id=1", name="one.safetensors"), cache_dir=tmp_path)
    assert fetch_adapter(f"{site.url}/a", cache_dir=tmp_path) == first
    fetch_adapter(site.give("/a?id=2", other, name="two.safetensors"), cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="/a: there is no such file"):
        fetch_adapter(f"{site.url}/a", cache_dir=tmp_path)  # which of the two?
    assert (
        fetch_adapter(site.give("/a", other, name="three.safetensors"), cache_dir=tmp_path).name
        == "three.safetensors"
    )


@pytest.mark.parametrize(
    "url",
    [
        "https://civitai.red/a",
        "https://www.civitai.red/a",
        "https://civitai.com.evil.org/a",
        "https://notcivitai.com/a",
        "https://evil.civitai.com/a",
        "https://civitai.com:8443/a",
        "https://civitаi.com/a",
        "https://huggingface.co/a",
        "https://civitai.com./a",
    ],
)
def test_civitais_token_goes_to_no_site_that_sounds_alike(url, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    assert address._token_for(address.checked_address(url), None) is None
    assert {address._token_for(f"https://{own}civitai.com/a", None) for own in ("", "www.")} == {
        TOKEN
    }


def test_the_hubs_token_goes_to_no_other_site(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SecretOfATest")
    fetch_adapter(site.give("/someone/mine/resolve/main/a.safetensors"), cache_dir=tmp_path)
    assert sent_token(site.requests[0]) is None


def test_a_site_may_hand_on_to_where_its_files_lie(site, other, tmp_path):
    stored = other.give("/stored/8f3a?sig=1", name="ink.safetensors")
    assert (
        fetch_adapter(site.send_on("/api/download/models/1", stored), cache_dir=tmp_path).name
        == "ink.safetensors"
    )


@pytest.mark.parametrize(
    "target", ["http://example.org/a", "file:///etc/passwd", "ftp://localhost/a"]
)
def test_a_site_may_not_hand_on_to_an_unsafe_address(site, tmp_path, target):
    with pytest.raises((ValueError, FileNotFoundError), match="only https|answered 307"):
        fetch_adapter(site.send_on("/a", target), cache_dir=tmp_path)


def test_https_is_not_handed_on_to_this_machine():
    request = address.Request("https://site.org/a")
    with pytest.raises(ValueError, match="site.org hands on to an address without https"):
        address._Redirects().redirect_request(request, None, 307, "", {}, "http://localhost:8080/a")


def test_a_circle_of_addresses_ends(site, tmp_path):
    with pytest.raises(FileNotFoundError, match="answered 307"):
        fetch_adapter(site.send_on("/a", "/a"), cache_dir=tmp_path)


def test_a_token_goes_to_its_site_and_to_no_other(site, other, tmp_path):
    stored = other.give("/stored", name="ink.safetensors")
    site.send_on("/second", stored)
    fetch_adapter(site.send_on("/first", "/second"), token=TOKEN, cache_dir=tmp_path)
    assert [sent_token(request) for request in site.requests] == [f"Bearer {TOKEN}"] * 2
    assert len(other.requests) == 1 and TOKEN not in str(other.requests)


def test_a_token_does_not_come_back_once_it_was_left_behind(site, other, tmp_path):
    site.give("/last", name="ink.safetensors")
    fetch_adapter(
        site.send_on("/first", other.send_on("/stored", f"{site.url}/last")),
        token=TOKEN,
        cache_dir=tmp_path,
    )
    assert [sent_token(request) for request in site.requests] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("name", address.CIVITAI_NAMES)
def test_civitais_token_comes_from_the_environment(civitai, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, f" {TOKEN}\n")
    fetch_adapter(civitai.give("/a"), cache_dir=tmp_path)
    assert sent_token(civitai.requests[0]) == f"Bearer {TOKEN}"


def test_civitais_token_comes_from_colabs_secrets(civitai, tmp_path, monkeypatch):
    userdata = types.SimpleNamespace(get={"CIVITAI_API_KEY": TOKEN}.__getitem__)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(userdata=userdata))
    monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)
    fetch_adapter(civitai.give("/a"), cache_dir=tmp_path)
    assert sent_token(civitai.requests[0]) == f"Bearer {TOKEN}"


def test_civitais_token_is_not_for_other_sites(site, tmp_path, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", TOKEN)
    fetch_adapter(site.give("/a"), cache_dir=tmp_path)
    assert sent_token(site.requests[0]) is None


def test_a_token_given_goes_before_the_environments(civitai, tmp_path, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", "another")
    fetch_adapter(civitai.give("/a"), token=TOKEN, cache_dir=tmp_path)
    assert sent_token(civitai.requests[0]) == f"Bearer {TOKEN}"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token, said", [(None, "wants a token"), (TOKEN, "in spite of the token")])
def test_a_site_that_wants_a_token_says_where_it_goes(civitai, tmp_path, status, token, said):
    url = civitai.give("/a?token=inside", status=status)
    with pytest.raises(
        ValueError, match=rf"/a: the site .*{said} \({status}\).*set CIVITAI_TOKEN"
    ) as told:
        fetch_adapter(url, token=token, cache_dir=tmp_path)
    assert (
        TOKEN not in str(told.value)
        and "inside" not in str(told.value)
        and len(str(told.value)) <= 400
    )
    assert told.value.__suppress_context__


def test_a_token_that_cannot_be_one_is_refused_and_not_shown(site, tmp_path):
    with pytest.raises(ValueError, match="token for .*/a has blanks or letters") as told:
        fetch_adapter(site.give("/a"), token="one\ntwo", cache_dir=tmp_path)
    assert (
        "one" not in str(told.value).split("token")[0]
        and "two" not in str(told.value)
        and not site.requests
    )


@pytest.mark.parametrize(
    "page", ["resolve/main", "blob/main", "resolve/refs%2Fpr%2F1", "blob/refs/pr/1"]
)
def test_the_address_of_a_file_on_the_hub_is_left_to_the_hubs_client(hub, tmp_path, page):
    hub.repos["someone/mine"] = {"sub/ink.safetensors": CONTENT, "ink.safetensors": CONTENT}
    name = "sub/ink.safetensors" if page.endswith("main") else "ink.safetensors"
    path = find_adapter(f"{hub.url}/someone/mine/{page}/{name}?download=true", cache_dir=tmp_path)
    assert (
        load_file(path).keys() == {"unet.x.lora_A.weight"} and "models--someone--mine" in path.parts
    )


def test_a_file_of_the_hub_is_not_asked_for_twice(hub, tmp_path):
    hub.repos["someone/mine"] = {"ink.safetensors": CONTENT}
    url = f"{hub.url}/someone/mine/resolve/main/ink.safetensors"
    first, asked = find_adapter(url, cache_dir=tmp_path), len(hub.requests)
    assert find_adapter(url, cache_dir=tmp_path) == first and len(hub.requests) == asked


def test_the_hubs_own_address_is_known():
    asked = hub_file("https://huggingface.co/someone/mine/blob/main/a%20b.safetensors")
    assert asked == ("someone/mine", "main", "a b.safetensors")


@pytest.mark.parametrize(
    ("files", "named"),
    [({}, "none.safetensors of someone/mine"), (None, "adapter 'someone/mine'")],
)
def test_what_the_hub_does_not_have_is_named(hub, tmp_path, files, named):
    hub.repos = {} if files is None else {"someone/mine": files}
    with pytest.raises(FileNotFoundError, match=f"{named} not found: the Hub did not give it"):
        find_adapter(f"{hub.url}/someone/mine/resolve/main/none.safetensors", cache_dir=tmp_path)


def test_a_pickle_on_the_hub_is_refused(hub, tmp_path):
    with pytest.raises(
        ValueError, match="someone/mine/sub/lora.bin is a pickle file.*allow_pickle"
    ):
        find_adapter(f"{hub.url}/someone/mine/resolve/main/sub/lora.bin", cache_dir=tmp_path)
    assert not hub.requests


def test_the_hash_is_that_of_the_content(site, tmp_path):
    path = fetch_adapter(site.give("/a"), cache_dir=tmp_path)
    assert sha256_of(path) == hashlib.sha256(CONTENT).hexdigest()
