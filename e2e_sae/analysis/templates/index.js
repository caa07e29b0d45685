"use strict";
// The table of latents: search, sort, and as many rows as were asked for. What is chosen is kept in the address, so that
// it is there again after a look at a page.
const { latents, hasOther } = JSON.parse(document.getElementById("data").textContent);
const AT_ONCE = 200;
const query = document.getElementById("query");
const scope = document.getElementById("scope");
const rows = document.getElementById("rows");
const more = document.getElementById("more");
const headers = [...document.querySelectorAll("th button")];

const chosen = new URLSearchParams(location.hash.slice(1));
query.value = chosen.get("q") ?? "";
scope.value = chosen.get("in") ?? "all";
let sort = { key: chosen.get("sort") ?? "kl", isUp: chosen.get("up") === "1" };
let nShown = AT_ONCE;
let found = [];

for (const latent of latents) {
  const contexts = latent.contexts.map((parts) => parts.join(""));
  latent.text = {
    all: [...latent.tokens, ...contexts].join("\n").toLowerCase(),
    tokens: latent.tokens.join("\n").toLowerCase(),
    promoted: latent.promoted.join("\n").toLowerCase(),
  };
}

function matches(latent, wanted) {
  return String(latent.n) === wanted.trim().replace(/^#/, "") || latent.text[scope.value].includes(wanted);
}

function compare(a, b) {
  const [x, y] = [a[sort.key], b[sort.key]];
  if (x === null || y === null) return (x === null) - (y === null);  // nothing is last, either way
  return (sort.isUp ? x - y : y - x) || a.n - b.n;
}

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[\p{C}\u2028\u2029]/gu, "�");
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function cell(row, className, ...content) {
  const made = element("td", className);
  made.append(...content);
  row.append(made);
}

function number(value) {
  return value === null ? "–" : String(Number(value.toPrecision(3)));
}

function rowOf(latent) {
  const row = element("tr");
  const link = element("a", "", String(latent.n));
  link.href = `latents/${latent.n}.html`;
  cell(row, "", link);
  cell(row, "", ...latent.tokens.map((text) => element("span", "token", visible(text).replaceAll(" ", "·"))));
  const snippet = element("div", "snippet");
  if (latent.contexts.length) {
    const [before, token, after] = latent.contexts[0].map(visible);
    const left = element("span", "before");
    left.append(element("span", "", before));
    snippet.append(left, element("mark", "s5", token), element("span", "after", after));
  }
  cell(row, "", snippet);
  cell(row, "number", `${number(100 * latent.frequency)} %`);
  for (const key of ["largest", "kl", "here", ...(hasOther ? ["other"] : [])]) cell(row, "number", number(latent[key]));
  return row;
}

function show() {
  rows.replaceChildren(...found.slice(0, nShown).map(rowOf));
  more.hidden = found.length <= nShown;
  document.getElementById("count").textContent = `${found.length} of ${latents.length} latents`;
}

function update() {
  const wanted = query.value.toLowerCase();
  found = latents.filter((latent) => matches(latent, wanted)).sort(compare);
  nShown = AT_ONCE;
  for (const header of headers) {
    const state = header.dataset.key !== sort.key ? "none" : sort.isUp ? "ascending" : "descending";
    header.closest("th").setAttribute("aria-sort", state);
  }
  show();
  const state = new URLSearchParams({ q: query.value, in: scope.value, sort: sort.key, up: Number(sort.isUp) });
  history.replaceState(null, "", `#${state}`);
}

query.addEventListener("input", update);
scope.addEventListener("change", update);
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && found.length) rows.querySelector("a").click();
});
for (const header of headers) {
  header.addEventListener("click", () => {
    const { key } = header.dataset;
    sort = { key, isUp: key === sort.key ? !sort.isUp : key === "n" };
    update();
  });
}
more.addEventListener("click", () => {
  nShown += AT_ONCE;
  show();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== query) {
    event.preventDefault();
    query.focus();
  }
});
update();
