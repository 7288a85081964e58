"use strict";
// What is shown stands in the address, behind "#": sort, filter, method, subject, prompt, zoom. So a view can be shared.
// Of several chosen subjects each stands on a line of its own.
(() => {
  const one = (selector, inside = document) => inside.querySelector(selector);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const fields = ["filter", "method", "prompt"].map((name) => one(`#${name}`)).filter(Boolean);
  const boxes = all("#subject input");
  const zoom = one("#zoom");
  let state = new Map();

  const read = () => new Map(new URLSearchParams(location.hash.slice(1)));
  const keep = () => {
    const text = new URLSearchParams([...state].filter(([, value]) => value)).toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  };
  const set = (name, value) => { state.set(name, value); keep(); show(); };

  // ---- tables ----
  const sorts = () => (state.get("sort") || "").split(",").map((part) => part.split(":")).filter((part) => part.length === 3);
  const compare = (a, b, turn) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is unknown stays last
    const [x, y] = [Number(a), Number(b)];
    return turn * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
  };
  const sort = () => {
    const wanted = new Map(sorts().map(([name, column, way]) => [name, [Number(column), way]]));
    for (const table of all("table.sheet")) {
      const body = table.tBodies[0], rows = [...body.rows];
      rows.forEach((row, place) => { row.dataset.place ??= place; });
      const heads = [...table.tHead.rows[0].cells];
      const [column, way] = wanted.get(table.id) || [-1, ""];
      heads.forEach((head, place) => {
        if (place === column) head.setAttribute("aria-sort", way === "desc" ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      const value = (row) => row.cells[column]?.dataset.value ?? "";
      rows.sort((a, b) => (column in heads && compare(value(a), value(b), way === "desc" ? -1 : 1)) || a.dataset.place - b.dataset.place);
      body.append(...rows);
    }
  };
  const sortBy = (head) => {
    const table = head.closest("table"), column = String(head.cellIndex);
    const before = sorts().find(([name]) => name === table.id);
    const numbers = head.classList.contains("number");
    const first = numbers && !head.textContent.includes("↓") && !["differences", "ranks", "cost"].includes(table.id) ? "desc" : "asc";
    const way = before?.[1] === column ? (before[2] === "asc" ? "desc" : "asc") : first;
    set("sort", [...sorts().filter(([name]) => name !== table.id), [table.id, column, way]].map((part) => part.join(":")).join(","));
  };

  // ---- means of chosen subjects ----
  const chosen = () => new Set((state.get("subject") || "").split("\n").filter((name) => boxes.some((box) => box.value === name)));
  const round = (value) => Number(value.toFixed(12));  // what differs in the last bits is equal, as in the ranks
  const mean = (cell, places) => {
    const found = JSON.parse(cell.dataset.parts).filter((value, place) => value !== null && places.has(place));
    return found.length ? round(found.reduce((sum, value) => sum + value, 0) / found.length) + 0 : null;
  };
  const average = () => {
    const names = chosen(), some = names.size > 0 && names.size < boxes.length;
    const places = new Set(boxes.map((box, place) => (names.has(box.value) ? place : -1)));
    const table = one("#scores");
    for (const box of boxes) box.checked = names.has(box.value);
    one("#subject output").textContent = some ? [...names].join(", ") : "all";
    one("#chosen").hidden = !some;
    one("#chosen").textContent = `${names.size} of ${boxes.length} subjects chosen: means, pictures and the lines of each `
      + "subject are of them; intervals, differences, ranks, orderings, cost and figures are of all.";
    table?.classList.toggle("chosen", some);
    [...(table?.tHead.rows[0].cells || [])].forEach((head, column) => {
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[column]).filter((cell) => cell?.dataset.parts);
      for (const cell of cells) {
        cell.dataset.all ??= JSON.stringify([one(".mean", cell).textContent, cell.dataset.value, cell.className]);
        const [text, value, kind] = JSON.parse(cell.dataset.all), now = some ? mean(cell, places) : null;
        const digits = (text.split(".")[1] || "").length;
        one(".mean", cell).textContent = !some ? text : now === null ? "–" : now.toFixed(digits).replace("-", "−");
        cell.dataset.value = some && value !== "" ? now ?? "" : value;  // real pictures are sorted nowhere
        cell.className = some ? kind.replace(/\b(best|second)\b/, "") : kind;
      }
      if (some) mark(cells.filter((cell) => cell.dataset.value !== ""), head.textContent.includes("↓") ? 1 : -1);
    });
  };
  const mark = (cells, sign) => {
    const [first, next] = [...new Set(cells.map((cell) => sign * Number(cell.dataset.value)))].sort((a, b) => a - b);
    if (next === undefined) return;
    const at = (place) => cells.filter((cell) => sign * Number(cell.dataset.value) === place);
    at(first).forEach((cell) => cell.classList.add("best"));
    if (at(first).length === 1) at(next).forEach((cell) => cell.classList.add("second"));
  };

  // ---- filters ----
  const filter = () => {
    const words = (state.get("filter") || "").toLowerCase().split(/\s+/).filter(Boolean);
    const [method, prompt] = ["method", "prompt"].map((name) => state.get(name) || "");
    const names = chosen(), other = (subject) => Boolean(names.size && subject && !names.has(subject));
    const matches = (text) => words.every((word) => text.toLowerCase().includes(word));
    for (const row of all("table.sheet tbody tr")) {
      const own = row.classList.contains("ceiling") || (matches(row.dataset.text)
        && (!method || [...row.cells].some((cell) => cell.dataset.value === method)));
      row.hidden = !own || other(row.dataset.subject);
    }
    const columns = new Set(all(".wall thead [data-method]").map((cell) => cell.dataset.method));
    const fitting = new Set([...columns].filter((name) => matches(name)));
    const shown = method ? new Set([method]) : fitting.size ? fitting : columns;
    for (const cell of all(".wall [data-method]")) cell.hidden = !shown.has(cell.dataset.method);
    for (const row of all(".wall tbody tr")) row.hidden = Boolean(prompt) && row.dataset.prompt !== prompt;
    for (const block of all(".block")) {
      block.hidden = other(block.dataset.subject) || !all("tbody tr:not([hidden])", block).length;
    }
    if (one("#each") && names.size) one("#each").open = true;
    for (const field of fields) if (field.value !== (state.get(field.id) || "")) field.value = state.get(field.id) || "";
  };

  // ---- one picture ----
  const pictures = () => all(".picture").filter((each) => !each.closest("[hidden]"));
  const enlarge = () => {
    const at = state.get("zoom"), found = at && all(".picture").find((each) => each.dataset.cell === at);
    zoom.hidden = !found;
    if (!found) return;
    const row = found.closest("tr"), block = found.closest(".block"), method = found.parentElement.dataset.method;
    const beside = one(".truth img", row) || one(".references img", block);
    one("#beside").hidden = !beside;
    if (beside) {
      one("#beside img").src = beside.src;
      one("#beside figcaption").textContent = one(".truth img", row) ? "what it should be" : "real picture";
    }
    one("#large").src = one("img", found).src;
    one("#large").alt = one("img", found).alt;
    one("#what").textContent = [method, found.dataset.note].filter(Boolean).join(" · ");
    one("#says").textContent = [block.dataset.subject, row.dataset.prompt, row.dataset.seed].filter(Boolean).join(" · ");
  };
  const go = (way) => {
    if (way === "close") return set("zoom", "");
    const [row, column] = state.get("zoom").split(".").map(Number);
    const places = pictures().map((each) => each.dataset.cell.split(".").map(Number));
    const side = way === "left" || way === "up" ? -1 : 1;
    const line = way === "left" || way === "right"
      ? places.filter(([r, c]) => r === row && (c - column) * side > 0)
      : places.filter(([r, c]) => c === column && (r - row) * side > 0);
    const next = line.length && line[side > 0 ? 0 : line.length - 1];
    if (next) set("zoom", next.join("."));
  };

  const show = () => { average(); sort(); filter(); enlarge(); };
  const start = () => { state = read(); show(); };
  document.addEventListener("click", (event) => {
    const head = event.target.closest("table.sheet th"), picture = event.target.closest(".picture");
    const key = event.target.closest("[data-go]");
    if (head) sortBy(head);
    else if (picture) set("zoom", picture.dataset.cell);
    else if (key) go(key.dataset.go);
    else if (event.target === zoom) set("zoom", "");
  });
  document.addEventListener("keydown", (event) => {
    if (!zoom.hidden) {
      const way = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", Escape: "close" }[event.key];
      if (way) { event.preventDefault(); go(way); }
    } else if (event.key === "Enter" && event.target.matches("table.sheet th")) sortBy(event.target);
  });
  for (const box of boxes) {
    box.addEventListener("input", () => set("subject", boxes.filter((each) => each.checked).map((each) => each.value).join("\n")));
  }
  for (const field of fields) field.addEventListener("input", () => set(field.id, field.value));
  one("#controls").addEventListener("submit", (event) => event.preventDefault());
  one("#controls").addEventListener("reset", (event) => { event.preventDefault(); state = new Map(); keep(); show(); });
  addEventListener("hashchange", start);
  let opened = [];
  addEventListener("beforeprint", () => { opened = all("details:not([open])"); opened.forEach((each) => { each.open = true; }); });
  addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));
  start();
})();
