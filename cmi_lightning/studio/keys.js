// What gradio's parts lack for the keyboard: arrow keys among choices, and on before/after sliders.
() => {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  const ends = { Home: -20, End: 20 }; // of a slider, in steps
  const middle = (slider) => slider.getBoundingClientRect().left + slider.offsetWidth / 2;
  const image = (slider) => { // its sides on the page
    const box = slider.parentNode.getBoundingClientRect(), shown = slider.parentNode.querySelector("img");
    const ratio = shown?.naturalHeight ? shown.naturalWidth / shown.naturalHeight : Infinity;
    const width = Math.min(box.width, box.height * ratio);
    return { left: box.left + (box.width - width) / 2, width };
  };
  const tell = () => {
    for (const slider of document.querySelectorAll("[data-testid=slider]")) {
      const { left, width } = image(slider);
      const told = {
        tabindex: 0, role: "slider", "aria-label": "before and after", "aria-valuemin": 0, "aria-valuemax": 100,
        "aria-valuenow": Math.round((100 * (middle(slider) - left)) / width),
      };
      for (const [name, value] of Object.entries(told)) slider.setAttribute(name, value);
      const images = slider.parentNode.querySelectorAll("img");
      ["before", "after"].forEach((name, k) => images[k] && (images[k].alt = name));
    }
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return; // the browser's own
    const at = event.target, step = steps[event.key];
    if (at.type === "radio" && step) {
      const all = [...(at.closest("fieldset, .block") ?? at.parentNode).querySelectorAll("input[type=radio]")];
      const next = all[(all.indexOf(at) + step + all.length) % all.length];
      next.focus();
      next.click();
    } else if (at.dataset?.testid === "slider" && (step ?? ends[event.key])) {
      const from = middle(at), to = from + ((step ?? ends[event.key]) * image(at).width) / 20;
      const drag = (kind, target, clientX) =>
        target.dispatchEvent(new MouseEvent(kind, { clientX, clientY: 5, bubbles: true, view: window }));
      drag("mousedown", at, from);
      drag("mousemove", window, to);
      drag("mouseup", window, to);
    } else return;
    event.preventDefault();
  });
  // A slider moves by its style, whoever moves it.
  new MutationObserver(tell).observe(document.body, { childList: true, subtree: true, attributeFilter: ["style"] });
};
