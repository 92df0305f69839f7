"use strict";
// All texts come from attributes and are set as text, so no name of a class can become markup.
const tiles = [...document.querySelectorAll(".tile")];
const dialog = document.querySelector("dialog");
const tools = document.querySelector(".tools");
const columns = Number(tools.dataset.columns);
let current = 0;

function field(name) { return dialog.querySelector(`[data-field="${name}"]`); }
function show(name, visible) { dialog.querySelector(`[data-row="${name}"]`).hidden = !visible; }

function place(element, column, row, rows) {
  element.style.backgroundPosition = `${100 * column / (columns - 1)}% ${rows > 1 ? 100 * row / (rows - 1) : 0}%`;
}

function neighbours(tile, row, column, rows) {
  const box = dialog.querySelector(".near");
  const texts = name => (tile.dataset[name] ?? "").split("\n");
  box.replaceChildren();
  if (tile.dataset.near === undefined) return;
  texts("near").forEach((distance, number) => {
    const figure = document.createElement("figure");
    const image = document.createElement("div");
    const caption = document.createElement("figcaption");
    image.className = "big n";
    place(image, column, row + number * rows, rows * texts("near").length);
    caption.textContent = [`distance ${distance}`, texts("nearClass")[number], texts("nearName")[number]].filter(Boolean).join("\n");
    figure.append(image, caption);
    box.append(figure);
  });
}

function open(number) {
  current = number;
  const tile = tiles[number], data = tile.dataset;
  const column = number % columns, row = Math.floor(number / columns), rows = Math.ceil(tiles.length / columns);
  document.querySelector("#name").textContent = `Sample ${data.index}`;
  for (const name of ["index", "class", "call", "difference"]) field(name).textContent = data[name] ?? "";
  field("call").textContent = `the samples ${data.call}, in one batch`;
  show("class", data.class !== undefined);
  show("difference", Boolean(data.difference));
  show("near", data.near !== undefined);
  show("copy", tile.classList.contains("copy"));
  field("command").textContent = `${field("command").dataset.common} ${data.own}`;
  place(field("a"), column, row, rows);
  const beside = field("b");
  if (beside) {
    place(beside, column, row, rows);
    beside.classList.toggle("none", data.difference === "");
    beside.classList.toggle("b", data.difference !== "");
  }
  neighbours(tile, row, column, rows);
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.disabled = tiles[number + Number(button.dataset.step)] === undefined;
  }
  history.replaceState(null, "", `#${data.index}`);
  if (!dialog.open) dialog.showModal();
}

function step(by) { if (tiles[current + by] !== undefined) open(current + by); }

async function copy(button) {
  const command = field("command");
  getSelection().selectAllChildren(command);
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(command.textContent);
    else document.execCommand("copy");
    button.textContent = "Copied";
  } catch {
    button.textContent = "Selected: press Ctrl-C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

function position(index) {
  let before = 0;
  for (const run of tools.dataset.runs.split(" ")) {
    const [first, last] = run.split("-").map(Number);
    if (first <= index && index <= last) return before + index - first;
    before += last - first + 1;
  }
  return -1;
}

tiles.forEach((tile, number) => tile.addEventListener("click", () => open(number)));
dialog.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (event.target === dialog) dialog.close();
  else if (button?.dataset.step) step(Number(button.dataset.step));
  else if (button && "copy" in button.dataset) copy(button);
});
dialog.addEventListener("close", () => tiles[current].focus());
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
function address(index) {
  const found = position(index);
  if (found < 0) return null;
  const page = Math.floor(found / Number(tools.dataset.perPage)) + 1;
  return `${page === 1 ? "index.html" : `all-${String(page).padStart(4, "0")}.html`}#${index}`;
}

tools.addEventListener("submit", event => {
  event.preventDefault();
  const target = address(Number(tools.elements.index.value.trim() || NaN));
  tools.elements.index.setCustomValidity(target === null ? "This gallery shows no image of this index." : "");
  if (target === null) tools.reportValidity(); else location.href = target;
});
tools.elements.index.addEventListener("input", event => event.target.setCustomValidity(""));
const root = document.documentElement;
const usual = Number(getComputedStyle(root).getPropertyValue("--factor"));
let factor = usual;
for (const button of tools.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    const by = Math.max(1, Math.round(usual / 2)) * Number(button.dataset.zoom);
    factor = Math.min(8 * usual, Math.max(1, factor + by));
    root.style.setProperty("--factor", factor);
  });
}
function fromAddress() {
  const number = tiles.findIndex(tile => `#${tile.dataset.index}` === location.hash);
  if (number >= 0) { open(number); return; }
  const target = /^#[0-9]+$/.test(location.hash) ? address(Number(location.hash.slice(1))) : null;
  if (target !== null && !location.pathname.endsWith(`/${target.split("#")[0]}`)) location.replace(target);
}
addEventListener("hashchange", fromAddress);
fromAddress();
