"use strict";
// Arrow keys go to the neighbouring pages, `i` to the index.
const RELATIONS = { ArrowLeft: "prev", ArrowRight: "next", i: "index" };
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const link = event.key in RELATIONS && document.querySelector(`a[rel=${RELATIONS[event.key]}]`);
  if (link) link.click();
});
