// What gradio's parts lack for the keyboard: arrow keys among choices, and on the before/after slider.
() => {
  const moves = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  const share = (slider) => {
    const line = slider.getBoundingClientRect(), all = slider.parentNode.getBoundingClientRect();
    return Math.round((100 * (line.left + line.width / 2 - all.left)) / all.width);
  };
  document.addEventListener("keydown", (event) => {
    const at = event.target, move = moves[event.key];
    if (!move) return;
    if (at.type === "radio") {
      const all = [...at.closest(".block").querySelectorAll("input[type=radio]")];
      const next = all[(all.indexOf(at) + move + all.length) % all.length];
      next.focus();
      next.click();
    } else if (at.dataset.testid === "slider") {
      const box = at.getBoundingClientRect(), from = box.left + box.width / 2;
      const drag = (kind, target, clientX) =>
        target.dispatchEvent(new MouseEvent(kind, { clientX, clientY: box.top + 5, bubbles: true, view: window }));
      const to = from + (move * at.parentNode.clientWidth) / 20;
      drag("mousedown", at, from);
      drag("mousemove", window, to);
      drag("mouseup", window, to);
      requestAnimationFrame(() => at.setAttribute("aria-valuenow", share(at)));
    } else return;
    event.preventDefault();
  });
  new MutationObserver(() => {
    for (const slider of document.querySelectorAll("[data-testid=slider]:not([tabindex])")) {
      const told = { tabindex: 0, role: "slider", "aria-label": "before and after", "aria-valuenow": share(slider) };
      for (const [name, value] of Object.entries(told)) slider.setAttribute(name, value);
      const images = slider.parentNode.querySelectorAll("img");
      ["before", "after"].forEach((name, k) => images[k] && (images[k].alt = name));
    }
  }).observe(document.body, { childList: true, subtree: true });
};
