// Elements without markup in strings: all text goes in as text, so nothing that a run wrote can become HTML.

// make("button", {class: "x", onclick: f, "aria-label": "y"}, "text", element, ...)
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

// Fill `host` anew when `key` changed. The element that has the focus keeps it, found again by its data-focus.
const filled = new WeakMap();

function fill(host, key, build) {
  if (filled.get(host) === key) return;
  filled.set(host, key);
  const active = host.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  const scroll = [host.scrollLeft, host.scrollTop];
  host.replaceChildren(...[].concat(build()));
  [host.scrollLeft, host.scrollTop] = scroll;
  if (active) [...host.querySelectorAll("[data-focus]")].find((item) => item.dataset.focus === active)?.focus();
}

// Into an input, unless somebody is typing there.
function showText(input, text) {
  if (document.activeElement !== input) input.value = text;
}

// Buttons of which one is pressed.
function choices(name, options, chosen, onchoose) {
  return options.map(([value, label]) =>
    make(
      "button",
      {
        type: "button",
        "aria-pressed": String(value === chosen),
        "data-focus": `${name}:${value}`,
        onclick: () => onchoose(value),
      },
      label,
    ),
  );
}

function checkbox(name, label, checked, onchange, before = null) {
  const input = make("input", { type: "checkbox", "data-focus": name, onchange });
  input.checked = checked;
  return make("label", { class: "check" }, input, before, label);
}

// A table of plain text, without sorting. On a narrow screen a "list" has its rows as text, each cell after its head.
function table(caption, heads, rows, list = false) {
  for (const row of rows) for (const [index, cell] of [...row.children].entries()) cell.dataset.head = heads[index];
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  return make(
    "table",
    { class: list ? "list-table" : null },
    make("caption", { class: "hidden" }, caption),
    make("thead", {}, head),
    make("tbody", {}, ...rows),
  );
}

function announce(text) {
  byId("announce").textContent = text;
}
