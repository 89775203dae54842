// Draws every chart of a page from the specification stored beside its picture; the picture stays where that fails.
async function drawCharts() {
  for (const figure of document.querySelectorAll("figure.chart")) {
    const box = document.createElement("div");
    try {
      figure.append(box);
      await vegaEmbed(box, JSON.parse(figure.querySelector("script").textContent), { mode: "vega-lite", renderer: "canvas", actions: false });
      figure.querySelector("img").remove();
    } catch (error) {
      box.remove();
      console.error(`chart not drawn: ${error}`);
    }
  }
}
document.addEventListener("DOMContentLoaded", () => { window.chartsDrawn = drawCharts(); });
