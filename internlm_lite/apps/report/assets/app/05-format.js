// Numbers and times as text. A value that is not there is an en dash.

const NONE = "–";

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function integer(value) {
  return isNumber(value) ? value.toLocaleString("en-US", { maximumFractionDigits: 0 }) : NONE;
}

function fixed(value, digits) {
  return isNumber(value) ? value.toFixed(digits) : NONE;
}

function percent(value, digits = 1) {
  return isNumber(value) ? `${(100 * value).toFixed(digits)} %` : NONE;
}

// For an axis, where equal digits would hide small differences or add zeros.
function percentTick(value) {
  return `${Number((100 * value).toPrecision(4))} %`;
}

// 1,234 · 12.3k · 4.50M · 7.89B
function compact(value) {
  if (!isNumber(value)) return NONE;
  const unit = UNITS.find(([size]) => Math.abs(value) >= size);
  if (unit && Math.abs(value) >= 1e4) return `${threeDigits(value / unit[0])}${unit[1]}`;
  return Number.isInteger(value) ? integer(value) : significant(value, 4);
}

const UNITS = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "k"],
];

function threeDigits(value) {
  return Math.abs(value) < 999.5 ? value.toPrecision(3) : value.toFixed(0);
}

// 4.23 · 51.84 · 146.7 · 104,321
function perplexityText(value) {
  return Math.abs(value) < 100 ? fixed(value, 2) : Math.abs(value) < 10000 ? fixed(value, 1) : compact(value);
}

// At most `digits` significant digits, without trailing zeros, small numbers with an exponent.
function significant(value, digits) {
  if (!isNumber(value)) return NONE;
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

function signed(value, digits) {
  if (!isNumber(value)) return NONE;
  const text = value.toFixed(digits);
  return value > 0 ? `+${text}` : text.replace("-", "−");
}

// The two largest units: 3 d 4 h, 12 min 5 s, 0.42 s.
function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 10) return `${significant(Math.max(0, seconds), 2)} ${t("second")}`;
  let rest = Math.round(seconds);
  const parts = [];
  for (const [size, unit] of [
    [86400, "day"],
    [3600, "hour"],
    [60, "minute"],
    [1, "second"],
  ]) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count || parts.length) parts.push([count, unit]);
  }
  return parts
    .slice(0, 2)
    .filter(([count], index) => index === 0 || count)
    .map(([count, unit]) => `${count} ${t(unit)}`)
    .join(" ");
}

// A moment in the reader's zone: 2026-11-21 10:21:05
function moment(iso) {
  const date = iso ? new Date(iso) : null;
  if (!date || Number.isNaN(date.getTime())) return NONE;
  return new Date(date.getTime() - 60000 * date.getTimezoneOffset()).toISOString().slice(0, 19).replace("T", " ");
}

function clock(iso) {
  const text = moment(iso);
  return text === NONE ? NONE : text.slice(11);
}

function seconds(iso) {
  const value = iso ? Date.parse(iso) / 1000 : NaN;
  return Number.isFinite(value) ? value : null;
}

// Labels of an axis: short, and the same kind for all ticks of it.
function tick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  if (size < 1e4) return String(Number(value.toPrecision(6)));
  return compact(value).replace(/\.?0+(?=[a-zA-Z])/, "");
}
