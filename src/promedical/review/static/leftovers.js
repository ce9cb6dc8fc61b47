/* On the start page: sends what pages of items left unsent in this browser, and names those items
 * whose two versions only the person can choose between. Needs `stores.js` and `autosave.js`.
 */
"use strict";

(async () => {
  const box = document.getElementById("leftovers");
  if (!box || !document.body.dataset.reviewer) return;
  const left = await Review.deliverLeftovers(new Review.OnlineStore());
  for (const { url, discard } of left) {
    const line = document.createElement("span");
    const link = document.createElement("a");
    link.href = url;
    link.textContent = box.dataset.open;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = box.dataset.discard;
    button.addEventListener("click", async () => {
      if (!confirm(box.dataset.sure)) return;
      await discard();
      line.remove();
      box.hidden = !box.querySelector("a");
    });
    line.className = "row";
    line.append(link, button);
    box.append(line);
  }
  box.hidden = !left.length;
})();
