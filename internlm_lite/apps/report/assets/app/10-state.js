// What the reader chose. It lives in the address's hash, so that a reload or a sent link shows the same.

const DEFAULTS = {
  tab: "loss",
  only: [],
  runs: [],
  smooth: 0.9,
  x: "step",
  y: "linear",
  scale: "common",
  zoom: [],
  marks: ["restart", "alert", "stage"],
  sort: "",
  theme: "auto",
  lang: "auto",
  reload: "",
  prompt: "",
  left: "",
  right: "",
  kind: "",
  find: "",
  key: "",
  diff: "",
  fold: "",
};

const ALLOWED = {
  tab: ["loss", "acc", "ppl", "share"],
  x: ["step", "epoch", "tokens", "time"],
  y: ["linear", "log"],
  scale: ["common", "own"],
  theme: ["auto", "light", "dark"],
  lang: ["auto", "en", "zh"],
};

let state = readHash();

function readHash() {
  const result = structuredClone(DEFAULTS);
  for (const part of location.hash.slice(1).split("&")) {
    const at = part.indexOf("=");
    const key = part.slice(0, at);
    if (at > 0 && Object.hasOwn(DEFAULTS, key)) result[key] = readValue(key, part.slice(at + 1));
  }
  return result;
}

function readValue(key, text) {
  const normal = DEFAULTS[key];
  const items = text === "" ? [] : text.split(",").map(decoded);
  if (key === "zoom") {
    const range = items.map(Number);
    return range.length === 2 && range.every(isNumber) && range[0] < range[1] ? range : [];
  }
  if (Array.isArray(normal)) return items;
  if (typeof normal === "number") return Math.min(0.99, Math.max(0, Number(text) || 0));
  const value = decoded(text);
  return ALLOWED[key] && !ALLOWED[key].includes(value) ? normal : value;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a link cut in the middle of a %XX
  }
}

function hashOf(values) {
  const parts = [];
  for (const [key, normal] of Object.entries(DEFAULTS)) {
    const value = values[key];
    if (String(value) === String(normal)) continue;
    parts.push(
      `${key}=${[]
        .concat(value)
        .map((item) => encodeURIComponent(item))
        .join(",")}`,
    );
  }
  return parts.join("&");
}

// Changes the state, the address and the page.
function choose(changes) {
  state = { ...state, ...changes };
  if ("x" in changes && !("zoom" in changes)) state.zoom = []; // its units are gone
  keepHash();
  render();
}

function keepHash() {
  try {
    history.replaceState(null, "", `#${hashOf(state)}`);
  } catch {
    // a viewer that shows the file inside its own page may forbid it; then nothing is remembered
  }
}

function toggled(list, item) {
  return list.includes(item) ? list.filter((other) => other !== item) : [...list, item];
}

// A link to a section is a hash too (#folders); it must not wipe what was chosen.
function hashChanged() {
  const target = location.hash.slice(1);
  if (target && !target.includes("=")) {
    keepHash();
    return;
  }
  state = readHash();
  render();
}
