(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const themed = () => {
    const style = getComputedStyle(document.documentElement);
    const [text, line, card] = ["--text", "--line", "--card"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    return { text, card, axis };
  };
  const draw = () => {
    const { text, card, axis } = themed();
    for (const source of document.querySelectorAll("script.figure")) {
      const { data, layout } = JSON.parse(source.textContent);
      layout.font = { color: text, size: 12, family: "system-ui, -apple-system, 'Segoe UI', sans-serif" };
      layout.hoverlabel = { bgcolor: card, bordercolor: axis.linecolor, font: { color: text } };
      layout.xaxis = { ...layout.xaxis, ...axis };
      layout.yaxis = { ...layout.yaxis, ...axis };
      Plotly.react(source.previousElementSibling, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
