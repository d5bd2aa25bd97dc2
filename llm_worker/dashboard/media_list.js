// The pictures and videos that the next question goes out with.

import { bytes, element, make, plural } from "./format.js";

// Of files whose type the browser does not know.
const VIDEO_NAMES = /\.(mp4|m4v|mov|mkv|webm|avi|mpe?g)$/i;
const IMAGE_NAMES = /\.(jpe?g|png|gif|webp|bmp|tiff?|avif|heic|jp2)$/i;

function kindOf(file) {
  if (file.type.startsWith("video/") || VIDEO_NAMES.test(file.name)) return "video";
  if (file.type.startsWith("image/") || IMAGE_NAMES.test(file.name)) return "picture";
  return null;
}

function base64Length(numBytes) {
  return 4 * Math.ceil(numBytes / 3);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}

export class MediaList {
  // onChange is called after each change.
  constructor(onChange) {
    this.items = [];
    this.onChange = onChange;
  }

  // Adds what can be sent; returns why the others cannot.
  add(files, maxBodyBytes) {
    const problems = [];
    for (const file of files) {
      const kind = kindOf(file);
      const sizes = [file, ...this.items.map((item) => item.file)].map(({ size }) => base64Length(size));
      if (kind === null) problems.push(`${file.name} is neither a picture nor a video.`);
      else if (sizes.reduce((sum, size) => sum + size) > maxBodyBytes) {
        const size = `${file.name} has ${bytes(file.size)}`;
        problems.push(`${size}: with it the request is larger than the ${bytes(maxBodyBytes)} that the worker takes.`);
      } else this.append(kind, file);
    }
    this.onChange();
    return problems;
  }

  append(kind, file) {
    const item = { kind, file, url: URL.createObjectURL(file), tile: make("li", kind) };
    const remove = make("button", "remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => this.remove(item));
    item.tile.append(preview(item), make("small", "", file.name), remove);
    item.tile.title = `${file.name}, ${bytes(file.size)}`;
    this.items.push(item);
    element("media").append(item.tile);
  }

  remove(item) {
    const index = this.items.indexOf(item);
    this.items.splice(index, 1);
    item.tile.remove();
    URL.revokeObjectURL(item.url);
    // The focus stays in the list while it has items.
    const next = this.items[Math.min(index, this.items.length - 1)];
    (next ? next.tile.querySelector(".remove") : element("files")).focus();
    this.onChange();
  }

  // For people: "2 pictures and 1 video", or "text only".
  get words() {
    const words = ["picture", "video"].flatMap((kind) => {
      const number = this.items.filter((item) => item.kind === kind).length;
      return number ? [plural(number, kind)] : [];
    });
    return words.join(" and ") || "text only";
  }

  // The items as parts of a chat message.
  async parts() {
    const parts = this.items.map(async ({ kind, file }) => {
      const url = await dataUrl(file);
      return kind === "video" ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
    });
    return Promise.all(parts);
  }
}

function preview({ kind, file, url }) {
  const shown = make(kind === "video" ? "video" : "img");
  if (kind === "video") {
    Object.assign(shown, { controls: true, muted: true, loop: true, playsInline: true, preload: "metadata" });
    shown.setAttribute("aria-label", file.name);
  } else {
    shown.alt = file.name;
    shown.draggable = false; // dropped on the page it would be added once more
  }
  // The worker may read what the browser cannot show.
  shown.addEventListener("error", () => shown.replaceWith(make("span", "no-preview", "no preview")));
  shown.src = url;
  return shown;
}
