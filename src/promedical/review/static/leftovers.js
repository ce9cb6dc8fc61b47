/* On the start page: sends what pages of items left unsent in this browser, and names those items
 * whose two versions only the person can choose between. Needs `autosave.js`.
 */
"use strict";

(async () => {
  const box = document.getElementById("leftovers");
  if (!box || !document.body.dataset.reviewer) return;
  const left = await Review.deliverLeftovers(new Review.OnlineStore());
  for (const { url } of left) {
    const link = document.createElement("a");
    link.href = url;
    link.textContent = box.dataset.open;
    box.append(" ", link);
  }
  box.hidden = !left.length;
})();
