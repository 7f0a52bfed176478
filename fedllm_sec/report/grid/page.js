// A square, or a run's name, opens the run: drawn from the data at the end of the page, as text and shapes only.
(() => {
  const box = document.getElementById("opened");
  const grid = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, values = {}, ...inside) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
    node.append(...inside.filter((part) => part !== null && part !== undefined));
    return node;
  };
  const shape = (tag, values, ...inside) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
    node.append(...inside);
    return node;
  };
  const link = (place, text) => make("a", { href: `#run-${place}` }, text);
  const whole = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const said = (value, unit) =>
    unit === "percent" ? `${Math.round(1000 * value) / 10} %` : String(Number(value.toPrecision(3)));

  const sameSlot = (a, b) => {
    const rest = (run) => JSON.stringify(Object.entries(run.axes).filter(([axis]) => axis !== grid.seed_axis).sort());
    return Boolean(a.is_twin) === Boolean(b.is_twin) && rest(a) === rest(b);
  };

  function picture(svg, says, caption) {
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", says);
    return make("figure", {}, svg, make("figcaption", {}, says, caption ? make("span", {}, ` ${caption}`) : null));
  }

  function curve({ title, unit, rounds, values, low, high, says }) {
    const [width, height, left, top, bottom] = [360, 170, 46, 24, 28];
    const all = [...values, ...(low ?? []), ...(high ?? [])];
    const share = unit === "percent" || unit === "rate";
    const from = share ? 0 : Math.min(...all);
    const to = share ? 1 : Math.max(...all);
    const last = rounds[rounds.length - 1];
    const x = (round) => left + ((round - rounds[0]) / (last - rounds[0] || 1)) * (width - left - 12);
    const y = (value) => height - bottom - ((value - from) / (to - from || 1)) * (height - top - bottom);
    const at = (list) => list.map((value, i) => `${x(rounds[i]).toFixed(1)},${y(value).toFixed(1)}`);
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "drawn" });
    svg.append(shape("text", { x: 0, y: 13, class: "title" }, title));
    for (const value of [from, (from + to) / 2, to]) {
      svg.append(shape("line", { x1: left, x2: width - 12, y1: y(value), y2: y(value), class: "grid" }));
      svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, said(value, unit)));
    }
    for (const round of [rounds[0], last]) {
      svg.append(shape("text", { x: x(round), y: height - 8, "text-anchor": round === last ? "end" : "start" }, `round ${round}`));
    }
    if (low) svg.append(shape("polygon", { points: [...at(low), ...at(high).reverse()].join(" "), class: "band" }));
    svg.append(shape("polyline", { points: at(values).join(" "), class: "line" }));
    for (const spot of at(values)) {
      const [cx, cy] = spot.split(",");
      svg.append(shape("circle", { cx, cy, r: 2.5, class: "spot" }));
    }
    return picture(svg, says, low ? "The band is the 95 % interval." : "");
  }

  function decisions({ ids, malicious, who, rounds, rows, of, of_rounds, selects, says }) {
    const named = ids.length <= 30;
    const [left, top, width] = [118, 24, 560];
    const step = named ? 14 : Math.max(3, 420 / ids.length);
    const column = (width - left - 4) / rounds.length;
    const height = top + step * ids.length + 24;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height.toFixed(0)}`, class: "drawn wide" });
    svg.append(shape("text", { x: 0, y: 13, class: "title" }, selects ? "Whom the rule kept" : "How much each client weighed"));
    rows.forEach((row, i) => {
      const y = top + i * step;
      if (named) {
        const text = ids[i].length > 16 ? `${ids[i].slice(0, 15)}…` : ids[i];
        svg.append(shape("text", { x: left - 6, y: y + step - 3, "text-anchor": "end", class: i < malicious ? "bad" : "" }, text));
      }
      for (let start = 0; start < row.length; ) {
        let end = start + 1;
        while (end < row.length && row[end] === row[start]) end += 1;
        const letter = row[start];
        if (letter !== ".") {
          // what was dropped is lower, what was quarantined a line: shapes say it without colours
          const part = letter === "d" ? 0.55 : letter === "q" ? 0.25 : 0.92;
          svg.append(shape("rect", {
            x: (left + start * column).toFixed(1), width: ((end - start) * column).toFixed(1),
            y: (y + (step * (0.96 - part)) / 2).toFixed(1), height: (step * part).toFixed(1),
            class: `letter ${letter >= "0" && letter <= "9" ? `w${letter}` : letter}`,
          }));
        }
        start = end;
      }
    });
    if (!named) {
      const groups = [[0, malicious, who], [malicious, ids.length, "honest"]];
      for (const [start, stop, name] of groups.filter(([a, b]) => b > a)) {
        const y = top + ((start + stop) / 2) * step + 4;
        svg.append(shape("text", { x: left - 6, y, "text-anchor": "end", class: start < malicious ? "bad" : "" }, `${stop - start} ${name}`));
      }
    }
    if (malicious > 0 && malicious < ids.length) {
      svg.append(shape("line", { x1: 0, x2: width - 4, y1: top + malicious * step, y2: top + malicious * step, class: "edge" }));
    }
    const low = height - 7;
    svg.append(shape("text", { x: left, y: low }, `round ${rounds[0]}`));
    svg.append(shape("text", { x: width - 4, y: low, "text-anchor": "end" }, `round ${rounds[rounds.length - 1]}`));
    const out = rows.some((row) => row.includes("q"));
    const thinned = [
      ids.length < of ? ` ${ids.length} of ${of} clients are drawn.` : "",
      rounds.length < of_rounds ? ` ${rounds.length} of ${of_rounds} rounds are drawn.` : "",
    ].join("");
    const figure = picture(svg, says, `One mark per client and round; clients that are ${who} stand first.${thinned}`);
    const keys = selects ? [["k", "kept"], ["d", "dropped"]] : [["w0", "no weight"], ["w5", "equal share"], ["w9", "double or more"]];
    if (out) keys.push(["q", "quarantined"]);
    figure.append(make("p", { class: "keys" }, ...keys.map(([name, text]) => {
      const sample = shape("svg", { viewBox: "0 0 16 14", class: "key", "aria-hidden": "true" });
      const part = name === "d" ? 7 : name === "q" ? 3 : 12;
      sample.append(shape("rect", { x: 1, width: 14, y: 7 - part / 2, height: part, class: `letter ${name}` }));
      return make("span", {}, sample, text);
    })));
    return figure;
  }

  function siblings(place) {
    const others = grid.runs.map((run, i) => [run, i]).filter(([run]) => sameSlot(run, grid.runs[place]));
    if (others.length < 2) return null;
    const parts = others.map(([run, i]) => {
      const text = `${grid.seed_axis} ${run.axes[grid.seed_axis] ?? i}${run.state === "done" ? "" : ` (${run.state})`}`;
      return i === place ? make("strong", { "aria-current": "true" }, text) : link(i, text);
    });
    return make("nav", { class: "seeds", "aria-label": "The same slot with other seeds" }, ...parts);
  }

  function show(place) {
    const run = grid.runs[place];
    const { attack = "base recipe", defense = "base recipe" } = run.axes;
    const close = make("button", { type: "button", class: "close" }, "Close");
    close.addEventListener("click", () => box.close());
    const title = `${attack === "none" ? "No attack" : attack} against ${defense === "none" ? "no defense" : defense}`;
    const labels = Object.entries(run.axes).map(([axis, label]) => make("li", {}, make("span", {}, axis), ` ${label}`));
    if (run.is_twin) labels.push(make("li", {}, "the twin of others"));
    const parts = [
      make("div", { class: "top" }, make("h2", { id: "opened-title", tabindex: "-1" }, title), close),
      siblings(place),
      make("ul", { class: "facts" }, ...labels),
    ];
    if (run.state !== "done") parts.push(make("p", { class: "warning" }, make("strong", {}, `${run.state[0].toUpperCase()}${run.state.slice(1)}. `), run.reason ?? ""));
    for (const text of run.warnings ?? []) parts.push(make("p", { class: "warning" }, text));
    if (run.trace) parts.push(make("details", {}, make("summary", {}, "Traceback"), make("pre", { tabindex: "0" }, run.trace)));
    if (run.measures) {
      const rows = run.measures.map(([name, value, range]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "number" }, make("b", {}, value)), make("td", { class: "number" }, make("small", {}, range))));
      parts.push(make("table", { class: "measures" }, make("tbody", {}, ...rows)));
      const known = run.measures.filter(([name]) => Object.hasOwn(grid.terms, name));
      const meanings = known.map(([name]) => make("div", {}, make("dt", {}, name), make("dd", {}, grid.terms[name])));
      parts.push(make("details", { class: "terms" }, make("summary", {}, "What these mean"), make("dl", {}, ...meanings)));
    }
    for (const text of run.remarks ?? []) parts.push(make("p", { class: "note" }, text));
    if (run.twin !== undefined) parts.push(make("p", { class: "note" }, "Its twin, attack-free and undefended: ", link(run.twin, grid.runs[run.twin].slug)));
    if (run.curves) parts.push(make("div", { class: "pictures" }, ...run.curves.map(curve)));
    if (run.decisions) parts.push(decisions(run.decisions));
    if (run.incidents) parts.push(make("h3", {}, "Quarantined rows and skipped rounds"), make("ul", {}, ...run.incidents.map((text) => make("li", {}, text))));
    if (run.differs) {
      const rows = run.differs.map(([key, value]) => make("tr", {}, make("th", { scope: "row" }, make("code", {}, key)), make("td", {}, value)));
      parts.push(make("h3", {}, "Where its recipe differs from the first run’s"), make("table", {}, make("tbody", {}, ...rows)));
    }
    if (run.command) parts.push(make("h3", {}, "Command"), make("pre", { class: "command" }, make("code", {}, run.command)));
    parts.push(make("p", { class: "note" }, `Folder: ${run.slug}`));
    box.replaceChildren(...parts.filter(Boolean));
    if (!box.open) box.showModal();
    box.scrollTop = 0;
    box.querySelector("h2").focus();
    history.replaceState(null, "", `#run-${place}`);
  }

  const asked = (text) => {
    const found = /^#run-(\d+)$/.exec(text ?? "");
    return found && Number(found[1]) < grid.runs.length ? Number(found[1]) : null;
  };
  document.addEventListener("click", (event) => {
    const place = asked(event.target.closest?.("a")?.getAttribute("href"));
    if (event.target === box) box.close(); // beside the open run
    if (place === null || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(place);
  });
  box.addEventListener("close", () => history.replaceState(null, "", location.href.split("#")[0]));
  addEventListener("hashchange", () => asked(location.hash) !== null && show(asked(location.hash)));

  // arrow keys walk over the squares of a map
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const cell = event.target.closest?.("table.heat td");
    if (!step || !cell) return;
    const rows = [...cell.closest("tbody").rows];
    let [row, column] = [rows.indexOf(cell.parentElement), cell.cellIndex];
    for (;;) {
      row += step[0];
      column += step[1];
      const next = rows[row]?.cells[column];
      if (!next) return;
      const inside = next.querySelector("a");
      if (!inside && column > 0) continue;
      event.preventDefault();
      inside?.focus();
      return;
    }
  });

  // one part of the grid, or all of them one below the other
  const form = document.querySelector("form.split");
  if (form) {
    const choose = () => {
      const wanted = [...form.querySelectorAll("select")].filter((list) => list.value).map((list) => [list.dataset.axis, list.value.slice(1)]);
      const slices = [...document.querySelectorAll("section.slice")];
      for (const slice of slices) {
        const fixed = JSON.parse(slice.dataset.fixed);
        slice.hidden = !wanted.every(([axis, label]) => fixed[axis] === label);
      }
      form.querySelector("output").textContent = `${slices.filter((slice) => !slice.hidden).length} of ${whole(slices.length, "part")} shown`;
    };
    form.hidden = false;
    form.addEventListener("change", choose);
    choose();
  }
  if (asked(location.hash) !== null) show(asked(location.hash));
})();
