// A colour and a dash for each folder, and a dash for each run.
// Okabe and Ito's eight colours, which colour-blind readers tell apart; on white the palest are darkened, on black the
// darkest lightened, to keep a contrast of 3. Folders beyond the eighth get these hues with other dashes and lightness.

const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b3588f", "#c48a00", "#2f8fc4", "#4a4f55", "#8f8500"],
  dark: ["#4aa8e0", "#f0803a", "#20c79a", "#e08fbd", "#e69f00", "#8accf2", "#f2f2f2", "#f0e442"],
};
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [16, 4]];
const SHADES = { light: [0, 0.3, 0.15, 0.5, 0.4], dark: [0, 0.35, -0.3, 0.55, -0.15] }; // towards the ink, or the paper

function dark() {
  if (state.theme !== "auto") return state.theme === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function folderColour(name) {
  const index = folderNames().indexOf(name);
  const theme = dark() ? "dark" : "light";
  const round = Math.floor(index / 8) % SHADES[theme].length;
  return shaded(PALETTE[theme][index % 8], SHADES[theme][round]);
}

// Over several runs the dash says which run, over one it sets the folders beyond the eighth apart.
function lineDash(name, run) {
  const index = manyRuns() ? runNumber(run) : Math.floor(folderNames().indexOf(name) / 8);
  return DASHES[Math.max(0, index) % DASHES.length];
}

function plainColour(index) {
  return PALETTE[dark() ? "dark" : "light"][index];
}

function shaded(colour, amount) {
  if (!amount) return colour;
  const ink = amount > 0 !== dark() ? 0 : 255;
  const part = Math.abs(amount);
  const mixed = [1, 3, 5].map((at) => Math.round((1 - part) * parseInt(colour.slice(at, at + 2), 16) + part * ink));
  return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

// So that what is behind does not hide what is before it, however many lines there are.
function faint(colour, lines) {
  return `${colour}${lines > MOST_NAMES ? "14" : "38"}`;
}

// The piece of line that stands before a name.
function swatch(colour, dash) {
  return draw(
    "svg",
    { class: "swatch", width: 26, height: 10, "aria-hidden": "true" },
    draw("line", {
      x1: 1,
      x2: 25,
      y1: 5,
      y2: 5,
      stroke: colour,
      "stroke-width": 2.5,
      "stroke-dasharray": dash.join(" ") || "none",
    }),
  );
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
