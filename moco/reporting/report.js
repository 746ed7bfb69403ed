"use strict";
// Draws the charts and maps of a report from plotly figures, which the page contains as JSON. The style sheet sets the
// colors of text and axes, so that nothing is redrawn when the color scheme changes.
(() => {
  const page = JSON.parse(document.getElementById("figures").textContent);
  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: "reset" };

  for (const [name, figure] of Object.entries(page.charts)) {
    const folded = document.getElementById(name).closest("details");
    const draw = () => Plotly.newPlot(name, figure.data, figure.layout, settings);
    if (folded) folded.addEventListener("toggle", draw, { once: true }); // a folded chart has no width
    else draw();
  }
  for (const [name, map] of Object.entries(page.maps)) open(document.getElementById(name), map);

  function open(root, map) {
    const plot = root.querySelector(".plot");
    const find = (what) => root.querySelector(what);
    const button = (what) => find(`[data-do=${what}]`);
    let kind = find("input[type=radio]").value;
    let hidden = new Set(); // numbers of the hidden groups
    let current = -1; // the selected image
    let zoomed = null; // the ranges of the axes; null: the full map

    const ring = () => ({
      x: current < 0 ? [] : [map.x[current]], y: current < 0 ? [] : [map.y[current]],
      mode: "markers", hoverinfo: "skip", cliponaxis: false,
      marker: { size: 19, color: "rgba(0,0,0,0)", line: { width: 3, color: getComputedStyle(root).color } },
    });
    const visible = () => map.colorings[kind].traces
      .filter((_, number) => !hidden.has(number)).flatMap((trace) => trace.customdata);

    function draw() {
      const size = plot.clientWidth < 500 ? 6 : 9; // small screens
      const traces = map.colorings[kind].traces.map((trace, number) => (
        { ...trace, visible: !hidden.has(number), marker: { ...trace.marker, size } }));
      const layout = structuredClone(map.layout);
      const ranges = zoomed ?? { x: range(map.x), y: range(map.y) }; // hiding groups does not change the ranges
      layout.xaxis.range = ranges.x;
      layout.yaxis.range = ranges.y;
      return Plotly.react(plot, [...traces, ring()], layout, settings);
    }

    function range(values) {
      const low = Math.min(...values), high = Math.max(...values), edge = 0.05 * (high - low) || 1;
      return [low - edge, high + edge];
    }

    function legend() {
      const buttons = map.colorings[kind].legend.map((group, number) => {
        const each = document.createElement("button");
        const sign = document.createElement("span");
        each.type = "button";
        each.setAttribute("aria-pressed", String(!hidden.has(number)));
        sign.textContent = group.sign;
        sign.style.color = group.color;
        sign.setAttribute("aria-hidden", "true");
        each.append(sign, ` ${group.name} `);
        const count = document.createElement("small");
        count.textContent = group.count.toLocaleString("en");
        each.append(count);
        each.addEventListener("click", () => {
          hidden.has(number) ? hidden.delete(number) : hidden.add(number);
          each.setAttribute("aria-pressed", String(!hidden.has(number)));
          draw();
        });
        return each;
      });
      find(".legend").replaceChildren(...buttons);
    }

    function show(point) {
      if (point === current) return;
      current = point;
      const image = document.createElement("img");
      image.src = page.images[map.images[point]];
      image.alt = map.names[point];
      find(".shown").replaceChildren(image);
      find(".name").textContent = map.names[point];
      find(".group").textContent = Object.entries(map.groups)
        .map(([what, groups]) => (groups[point].startsWith(what) ? groups[point] : `${what} ${groups[point]}`)).join(" · ");
      const last = map.colorings[kind].traces.length; // the ring is the last trace
      Plotly.restyle(plot, { x: [[map.x[point]]], y: [[map.y[point]]] }, [last]);
    }

    function step(by) {
      const points = visible();
      if (!points.length) return;
      const at = points.indexOf(current);
      show(points[at < 0 ? (by > 0 ? 0 : points.length - 1) : (at + by + points.length) % points.length]);
    }

    function toward(right, up) {
      const points = visible().filter((point) => point !== current);
      if (current < 0) return step(1);
      let best = -1, least = Infinity;
      for (const point of points) {
        const x = map.x[point] - map.x[current], y = map.y[point] - map.y[current];
        const along = x * right + y * up, aside = Math.abs(x * up) + Math.abs(y * right);
        const cost = along + 2 * aside; // prefers points in the arrow's direction
        if (along > 0 && aside <= 2 * along && cost < least) [best, least] = [point, cost];
      }
      if (best >= 0) show(best);
    }

    function zoom(times) {
      const full = { x: range(map.x), y: range(map.y) };
      if (!times) zoomed = null;
      else {
        const from = zoomed ?? full;
        const around = (axis, at) => {
          const half = (from[axis][1] - from[axis][0]) / 2 / times;
          return [at - half, at + half];
        };
        const middle = (axis) => (from[axis][0] + from[axis][1]) / 2;
        zoomed = { x: around("x", current < 0 ? middle("x") : map.x[current]),
                   y: around("y", current < 0 ? middle("y") : map.y[current]) };
      }
      draw();
    }

    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    plot.addEventListener("keydown", (event) => {
      const way = arrows[event.key];
      if (!way || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      toward(...way);
    });
    button("next").addEventListener("click", () => step(1));
    button("previous").addEventListener("click", () => step(-1));
    button("in").addEventListener("click", () => zoom(2));
    button("out").addEventListener("click", () => zoom(0));
    for (const [what, none] of [["all", false], ["none", true]]) {
      button(what).addEventListener("click", () => {
        hidden = new Set(none ? map.colorings[kind].traces.keys() : []);
        legend();
        draw();
      });
    }
    for (const choice of root.querySelectorAll("input[type=radio]")) {
      choice.addEventListener("change", () => {
        kind = choice.value;
        hidden = new Set();
        legend();
        draw();
      });
    }
    legend();
    draw().then(() => {
      const shown = (event) => show(event.points[0].customdata);
      plot.on("plotly_hover", shown);
      plot.on("plotly_click", shown); // a tap
    });
  }
})();
