"use strict";
// Unpacks the library and the figures, draws them with plotly.js, and follows the pickers and the theme.

const byId = (id) => document.getElementById(id);
let page, theme, layer = 0, expert = -1, themeWasChosen = false;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// The figure in the colors of the theme, and with the chosen expert before the others.
function painted(figure) {
  const colors = page.themes[theme];
  const data = figure.data.map((trace) => {
    const meta = trace.meta || {};
    if (meta.levels) return { ...trace, colorscale: colors.levels, textfont: { color: colors.number } };
    if (meta.width === undefined) return trace;
    const color = colors.widths[meta.width];
    const found = { ...trace, marker: { ...trace.marker, color }, line: { ...trace.line, color } };
    if (meta.expert !== undefined && expert >= 0) {
      found.opacity = meta.expert === expert ? 1 : 0.15;
      if (meta.expert === expert) found.line.width = 4;
    }
    if (trace.customdata && expert >= 0) found.selectedpoints = [trace.customdata.indexOf(expert)].filter((i) => i >= 0);
    return found;
  });
  const touch = matchMedia("(pointer: coarse)").matches;  // a finger scrolls the page, and does not zoom the chart
  return [data, { ...figure.layout, template: colors.template, dragmode: touch ? false : "zoom" }];
}

function draw(id, figure) {
  const place = byId(id);
  if (!place || !figure) return;
  const [data, layout] = painted(figure);
  Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
}

// The norms themselves, or how far they are from the first one.
function curves(figure) {
  if (byId("curve").value === "norm") return figure;
  const data = figure.data.map((t) => ({ ...t, y: t.y.map((y) => (y === null || t.y[0] === null ? null : y - t.y[0])) }));
  const yaxis = { ...figure.layout.yaxis, title: { text: "change of router L2 norm" } };
  return { data, layout: { ...figure.layout, yaxis } };
}

function fill(rows) {
  byId("values").replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    for (const value of row) line.insertCell().textContent = value === null ? "-" : String(value);
    return line;
  }));
}

function drawLayer() {
  const shown = page.layers[layer];
  byId("layer").value = String(layer);
  for (const place of document.querySelectorAll(".layer-name")) place.textContent = shown.name;
  const options = shown.rows.map((row, index) => new Option(`expert ${index}`, String(index)));
  byId("expert").replaceChildren(new Option("all experts", "-1"), ...options);
  if (expert >= shown.rows.length) expert = -1;
  byId("expert").value = String(expert);
  if (shown.curves && byId("curves")) draw("curves", curves(shown.curves));
  shown.pairs.forEach((figure, index) => draw(`pair-${index}`, figure));
  fill(shown.rows);
}

function drawAll() {
  drawLayer();
  for (const [id, figure] of Object.entries(page.charts)) draw(id, figure);
}

function setTheme(name) {
  theme = name;
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
}

function choose(nextLayer, nextExpert) {
  layer = (nextLayer + page.layers.length) % page.layers.length;
  expert = nextExpert;
  drawLayer();
}

function listen() {
  byId("layer").addEventListener("change", (event) => choose(Number(event.target.value), expert));
  byId("expert").addEventListener("change", (event) => choose(layer, Number(event.target.value)));
  byId("before").addEventListener("click", () => choose(layer - 1, expert));
  byId("after").addEventListener("click", () => choose(layer + 1, expert));
  byId("curve").addEventListener("change", drawLayer);
  byId("theme").addEventListener("click", () => {
    themeWasChosen = true;
    setTheme(theme === "dark" ? "light" : "dark");
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    if (themeWasChosen) return;
    setTheme(event.matches ? "dark" : "light");
    drawAll();
  });
  for (const place of document.querySelectorAll(".bits")) {
    place.on("plotly_click", (event) => choose(event.points[0].y, event.points[0].x));
  }
  if (byId("curves")) byId("curves").on("plotly_click", (event) => choose(layer, event.points[0].data.meta.expert));
}

function copyButtons() {
  for (const button of document.querySelectorAll(".command button")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      }
    });
  }
}

async function start() {
  setTheme(document.documentElement.dataset.theme);
  copyButtons();
  try {
    const library = document.createElement("script");
    library.textContent = await unpacked("library");
    document.head.append(library);
    page = JSON.parse(await unpacked("figures"));
    drawAll();
    listen();
    document.documentElement.dataset.drawn = "yes";
  } catch (error) {
    byId("broken").hidden = false;
    byId("broken").textContent = `The charts could not be drawn (${error}). They need a browser of 2023 or later.`;
  }
}

start();
