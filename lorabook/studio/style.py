"""How the studio looks, in light and dark themes."""

from lorabook.show.plots import BLUE, GREEN, ORANGE

_INK, _FAINT, _LINE = (
    "var(--jp-ui-font-color1, #222)",
    "var(--jp-ui-font-color2, #6a6a6a)",
    "var(--jp-border-color2, #dcdcdc)",
)
_PAPER, _SUNK = "var(--jp-layout-color1, #fff)", "var(--jp-layout-color2, #f5f5f5)"

_TICKS = ", ".join(["linear-gradient(#8a8a8a, #8a8a8a)"] * 2)  # a slider's marks at 0 and at 1

# ipywidgets gives the handle of a slider, and the number beside it, no name that a screen reader could say
LABELS = """<img alt="" src="data:," onerror="
const root = this.closest('.lorabook-studio');
const name = () => root.querySelectorAll('.widget-slider').forEach(slider => {
  const text = slider.querySelector('label')?.textContent, about = slider.querySelector('label')?.title;
  slider.querySelectorAll('.noUi-handle, .ui-slider-handle, .widget-readout').forEach(part =>
    part.hasAttribute('aria-label') || part.setAttribute('aria-label', about || text));
});
if (root) { new MutationObserver(name).observe(root, {childList: true, subtree: true}); name(); }
">"""

STYLES = f"""<style>
.lorabook-studio {{ border: 1px solid {_LINE}; border-radius: 10px; padding: 10px 16px 16px; background: {_PAPER};
  color: {_INK}; max-width: 1180px; box-sizing: border-box; gap: 10px; }}
.lorabook-studio .widget-box {{ overflow: visible; }}
.lorabook-studio :focus-visible {{ outline: 2px solid {BLUE}; outline-offset: 1px; }}
.lorabook-bar {{ align-items: center; gap: 6px; flex-flow: row wrap;
  border-bottom: 1px solid {_LINE}; padding-bottom: 8px; }}
.lorabook-name {{ margin-right: 8px; }}
.lorabook-name .widget-html-content {{ font-weight: 600; font-size: 14px; letter-spacing: .02em; line-height: 28px; }}
.lorabook-status {{ flex: 1 1 260px; min-width: 0; }}
.lorabook-status .widget-html-content {{ text-align: right; font-size: 12px; line-height: 1.35; color: {_FAINT};
  font-variant-numeric: tabular-nums; white-space: normal; }}
.lorabook-status.lorabook-wrong .widget-html-content {{ color: var(--jp-error-color1, #b3261e); font-weight: 600; }}
.lorabook-words {{ gap: 14px; flex-flow: row wrap; }}
.lorabook-body {{ gap: 22px; flex-flow: row wrap; align-items: flex-start; }}
.lorabook-left {{ flex: 0 1 auto; gap: 12px; max-width: 100%; }}
.lorabook-right {{ flex: 1 1 520px; min-width: min(520px, 100%); }}
.lorabook-wide .lorabook-left {{ flex: 1 1 100%; flex-flow: row wrap; }}
.lorabook-wide .lorabook-stage {{ flex: 0 1 auto; }}
.lorabook-wide .lorabook-call {{ flex: 1 1 220px; min-width: 0; width: auto; max-width: 420px; }}
.lorabook-stage {{ flex-flow: row wrap; gap: 12px; max-width: 800px; }}
.lorabook-compared {{ flex-flow: row wrap; gap: 12px; }}
.lorabook-stack {{ gap: 8px; }}
.lorabook-figure {{ gap: 5px; }}
.lorabook-studio {{ container-type: inline-size; width: 100%; }}
.lorabook-call {{ gap: 4px; width: 320px; max-width: 100%; }}
@container (max-width: 960px) {{
  .lorabook-left {{ flex: 1 1 100%; flex-flow: row wrap; }}
  .lorabook-call {{ flex: 1 1 230px; }}
}}
.lorabook-row, .lorabook-channel {{ align-items: center; gap: 8px; min-width: 0; }}
.lorabook-picture {{ image-rendering: pixelated; border-radius: 4px; height: auto; display: block; margin: 0; }}
.lorabook-now {{ box-shadow: 0 0 0 1px {_LINE}; }}
.lorabook-caption .widget-html-content {{ font-size: 11px; line-height: 1.3; color: {_FAINT}; white-space: normal; }}
.lorabook-note .widget-html-content {{ font-size: 12px; line-height: 1.35; color: {_FAINT}; white-space: normal; }}
.lorabook-title .widget-html-content {{ font-size: 12px; line-height: 1.3; font-weight: 600; color: {_FAINT}; }}
.lorabook-studio .widget-inline-hbox, .lorabook-studio .widget-button, .lorabook-studio .widget-html {{ margin: 0; }}
.lorabook-studio .widget-label {{ color: {_FAINT}; font-size: 12px; }}
.lorabook-studio .widget-readout {{ min-width: 42px; max-width: 42px; text-align: right; font-variant-numeric: tabular-nums;
  font-size: 12px; }}
.lorabook-studio .lorabook-button, .lorabook-studio .lorabook-switch {{ border-radius: 6px; border: 1px solid {_LINE};
  background: {_PAPER}; color: {_INK};
  padding: 0 10px; height: 28px; line-height: 26px; box-shadow: none; flex: 0 0 auto; }}
.lorabook-studio .lorabook-button:hover, .lorabook-studio .lorabook-switch:hover {{ background: {_SUNK}; }}
.lorabook-button:disabled {{ opacity: .4; }}
.lorabook-studio .lorabook-switch.mod-active {{ background: {BLUE}; border-color: {BLUE}; color: #fff; box-shadow: none; }}
.lorabook-studio .lorabook-back, .lorabook-studio .lorabook-drop {{ border: none; background: none; padding: 0 4px;
  width: 22px; color: {_FAINT};
  font-size: 15px; }}
.lorabook-studio .lorabook-back.jupyter-button::before {{ content: "↺"; content: "↺" / ""; }}
.lorabook-studio .lorabook-drop.jupyter-button::before {{ content: "×"; content: "×" / ""; }}
.lorabook-row:not(.lorabook-moved) > .lorabook-back {{ opacity: .35; }}
.lorabook-moved .widget-readout {{ font-weight: 700; }}
.lorabook-call .widget-label {{ width: 60px !important; text-align: left; }}
.lorabook-studio .widget-text, .lorabook-studio .widget-dropdown, .lorabook-studio input {{ min-width: 0; }}
.lorabook-take {{ gap: 8px; }}
.lorabook-take .widget-label {{ width: 50px !important; text-align: left; }}
.lorabook-take .lorabook-code .widget-label {{ width: 0 !important; margin: 0; overflow: hidden; }}
.lorabook-channel .widget-label {{ width: 90px !important; }}
.lorabook-undo::before {{ content: "↶ "; content: "↶ " / ""; }}
.lorabook-redo::before {{ content: "↷ "; content: "↷ " / ""; }}
.lorabook-ticked .noUi-target::after, .lorabook-ticked .ui-slider::after {{ content: ""; position: absolute; inset: -5px 0;
  pointer-events: none; background: {_TICKS}; background-size: 1px 100%; background-repeat: no-repeat;
  background-position: 33.33% 0, 66.67% 0; }}
.lorabook-ticked .noUi-base {{ z-index: 1; }}
.lorabook-studio .noUi-target {{ border: none; box-shadow: none; }}
.lorabook-down, .lorabook-mid, .lorabook-up, .lorabook-beside-one, .lorabook-untouched {{ border-radius: 6px;
  background: {_SUNK}; padding: 1px 2px 1px 10px; border-left: 4px solid; gap: 2px; min-height: 32px; }}
.lorabook-down {{ border-left-color: {BLUE}; }}
.lorabook-up {{ border-left-color: {ORANGE}; }}
.lorabook-mid {{ border-left-color: #8a8a8a; }}
.lorabook-beside-one {{ border-left-color: {GREEN}; flex: 1 1 200px; }}
.lorabook-untouched {{ background: none; border: 1px dotted {_LINE}; }}
.lorabook-untouched .widget-html-content {{ font-size: 12px; line-height: 30px; color: {_FAINT}; }}
.lorabook-skip {{ align-self: center; border-top: 2px dotted {_LINE}; height: 0; margin: 0 3px !important; }}
.lorabook-bottom {{ grid-column: 1 / -1; width: 52%; justify-self: center; }}
.lorabook-beside {{ gap: 8px; flex-flow: row wrap; }}
.lorabook-cells {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 2px 16px; }}
.lorabook-parts {{ gap: 10px; max-height: 330px; overflow-y: auto !important; padding: 8px 4px;
  border-top: 1px solid {_LINE}; }}
.lorabook-parts > * {{ flex: none; }}
.lorabook-wall {{ flex-flow: row wrap; gap: 12px; max-height: 380px; overflow-y: auto !important; padding: 4px; }}
.lorabook-card {{ width: 132px; gap: 4px; align-items: center; background: {_SUNK}; border-radius: 8px; padding: 8px; }}
.lorabook-card img {{ border-radius: 4px; object-fit: cover; }}
.lorabook-card .lorabook-button {{ max-width: 100%; overflow: hidden; text-overflow: ellipsis; }}
.lorabook-code textarea {{ font-family: var(--jp-code-font-family, monospace); font-size: 12px; line-height: 1.4; }}
.lorabook-copy {{ border-radius: 6px; border: 1px solid {_LINE}; background: {_PAPER}; color: {_INK}; padding: 0 12px;
  height: 28px; cursor: pointer; }}
.lorabook-tabs .widget-tab-contents, .lorabook-tabs .jupyter-widget-tab-contents {{ padding: 12px; }}
</style>"""
