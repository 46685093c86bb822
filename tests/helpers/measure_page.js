// Shows a page (SOURCE) in the frame of this page, and writes what it measures there into a <pre>:
// widths, texts with too little contrast (below CONTRAST) or outside of the page, requests, and the
// second column of the first sortable table after one and after two clicks on its title.
const least = CONTRAST;
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const colors = (text) => text.match(/[\d.]+/g).map(Number);
  const over = (top, below) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
  };
  const background = (element) => {
    if (!element) return [255, 255, 255];
    const color = colors(view.getComputedStyle(element).backgroundColor);
    return color.length > 3 && color[3] === 0
      ? background(element.parentElement) : over(color, background(element.parentElement));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [], narrow = [];
  let texts = 0, smallest = 99;
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const box = element.getBoundingClientRect();
    if (!box.width) continue; // folded
    texts += 1;
    const style = view.getComputedStyle(element), svg = element.closest("svg");
    const below = background(element);
    const color = over(colors(svg ? style.fill : style.color), below);
    const [low, high] = [luminance(color), luminance(below)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least) faint.push([text, contrast.toFixed(2)]);
    let size = parseFloat(style.fontSize);
    if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    smallest = Math.min(smallest, size);
    const right = box.right + view.scrollX;
    if (right > root.clientWidth + 1 && !element.closest(".scroll, nav, pre")) narrow.push(text);
  }
  const table = page.querySelector("table.sortable");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
  const sorted = [];
  if (table) for (let click = 0; click < 2; click += 1) {
    table.tHead.rows[0].cells[1].querySelector("button").click();
    sorted.push(column());
  }
  const output = document.createElement("pre");
  output.id = "measured";
  output.textContent = JSON.stringify({
    width: view.innerWidth, scrollWidth: root.scrollWidth, texts, smallest, faint, narrow, sorted,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    page: luminance(background(page.body)),
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    images: [...page.images].map((image) => image.naturalWidth),
  });
  document.body.append(output);
});
frame.srcdoc = SOURCE;
