// What ipywidgets cannot do by itself. It runs once on a page, whatever number of studios there is.
(() => {
  if (window.lorabookStudio) return;
  window.lorabookStudio = true;

  // The handle of a slider, and the number beside it, have no name that a screen reader could say.
  const nameless = ['.noUi-handle', '.ui-slider-handle', '.widget-readout']
    .map(part => `.lorabook-studio .widget-slider ${part}:not([aria-label])`).join(', ');
  const nameAll = () => document.querySelectorAll(nameless).forEach(part => {
    const label = part.closest('.widget-slider').querySelector('label');
    if (label) part.setAttribute('aria-label', label.title || label.textContent);
  });
  new MutationObserver(nameAll).observe(document.body, {childList: true, subtree: true});
  nameAll();

  // Only the browser can write on its clipboard.
  document.addEventListener('click', event => {
    const button = event.target.closest('.lorabook-copy');
    if (!button) return;
    const area = button.closest('.lorabook-take').querySelector('textarea');
    area.select();
    (navigator.clipboard ? navigator.clipboard.writeText(area.value) : Promise.reject())
      .catch(() => document.execCommand('copy'));
    button.textContent = 'copied';
    setTimeout(() => { button.textContent = 'copy'; }, 1200);
  });
})();
