#!/usr/bin/env python3
"""Deterministic generator of hostile / awkward inputs for a Vision-Transformer toolbox.

    python badinputs.py public  DIR
    python badinputs.py selftest DIR     # makes them twice, checks determinism, prints counts

Only numpy, Pillow and the standard library. Nothing here does harm: every "code execution" file
only tries to make an EMPTY DIRECTORY called BADINPUT_CANARY_<name> in the current directory.
A harness runs the loader in an empty working directory and asserts that no BADINPUT_CANARY_* appears
(and that nothing outside its sandbox changed).

Each half writes DIR/<family>/... and DIR/manifest.json: a list of
  path      file or folder (relative)          family   image | fs | archive | ckpt | config | dataset | http | train
  expect    accept      must load, and `check` (if given) must hold
            reject      must be refused / listed in the scan report by file name + reason; never a crash, never replaced silently
            convert     must load after a documented, logged conversion or warning
            either      accept or reject, but inside the limits and with no side effect
  check     optional machine-readable condition        why   one line
  max_s / max_mb  limits on seconds and on resident-memory growth for handling this one file
"""

# ruff: noqa: C408, E501, N803, N806, PTH101, PTH103, PTH108, PTH118, PTH120, PTH123, PTH211, RET504, RUF005, SIM115
from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image, ImageCms

MAX_S, MAX_MB = 2.0, 300  # default limits per file
CANARY = "BADINPUT_CANARY_"
EPOCH = (1980, 1, 1, 0, 0, 0)


# ------------------------------------------------------------------ shared helpers
class Out:
    def __init__(self, root, half):
        self.root, self.half, self.items = root, half, []
        os.makedirs(root, exist_ok=True)

    def p(self, rel):
        full = os.path.join(self.root, rel)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        return full

    def note(self, rel, expect, why, family=None, check=None, max_s=MAX_S, max_mb=MAX_MB):
        self.items.append(
            dict(
                path=rel,
                family=family or rel.split("/")[0],
                expect=expect,
                why=why,
                check=check,
                max_s=max_s,
                max_mb=max_mb,
            )
        )

    def w(self, rel, data, expect, why, **kw):
        full = os.fsencode(self.p(rel))
        if os.path.lexists(full):
            os.unlink(full)  # so that a normal user can run it again over a mode-000 file
        with open(full, "wb") as f:
            f.write(data)
        self.note(rel, expect, why, **kw)
        self.items[-1].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    def done(self):
        with open(os.path.join(self.root, "manifest.json"), "w") as f:
            json.dump(dict(half=self.half, pillow=Image.__version__, items=self.items), f, indent=1, ensure_ascii=True)
        return self.items


def quad(w=64, h=48):
    """Four-colour picture: top-left red, top-right green, bottom-left blue, bottom-right white."""
    a = np.zeros((h, w, 3), np.uint8)
    a[: h // 2, : w // 2] = (255, 0, 0)
    a[: h // 2, w // 2 :] = (0, 255, 0)
    a[h // 2 :, : w // 2] = (0, 0, 255)
    a[h // 2 :, w // 2 :] = (255, 255, 255)
    return Image.fromarray(a)


def noise(seed, w=64, h=48, c=3):
    r = np.random.default_rng(seed)
    a = r.integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8)
    return Image.fromarray(a)


def enc(im, fmt, **kw):
    b = io.BytesIO()
    im.save(b, fmt, **kw)
    return b.getvalue()


def jpg(im=None, **kw):
    kw.setdefault("quality", 90)
    return enc(im or quad(), "JPEG", **kw)


def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e


# inverse of the transform a reader must apply, so that the upright picture is always quad()
_UNDO = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


def oriented(k):
    im = quad()
    return im.transpose(getattr(Image.Transpose, _UNDO[k])) if k in _UNDO else im


def chunk(t, d):
    return struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d) & 0xFFFFFFFF)


def zeros_deflated(total, level=9, block=1 << 20, fill=b"\0"):
    c = zlib.compressobj(level)
    out, left, z = [], total, fill * block
    while left > 0:
        n = min(left, block)
        out.append(c.compress(z[:n]))
        left -= n
    out.append(c.flush())
    return b"".join(out)


def png(w, h, depth, ctype, idat, extra=b"", crc_break=None):
    ihdr = struct.pack(">IIBBBBB", w, h, depth, ctype, 0, 0, 0)
    b = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + extra + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    if crc_break:
        i = b.index(crc_break)
        n = struct.unpack(">I", b[i - 4 : i])[0]
        j = i + 4 + n
        b = b[:j] + bytes([b[j] ^ 0xFF]) + b[j + 1 :]
    return b


def jpeg_set_size(data, w, h):
    i = 2
    while i < len(data):
        m, n = data[i + 1], struct.unpack(">H", data[i + 2 : i + 4])[0]
        if 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC):
            return data[: i + 5] + struct.pack(">HH", h, w) + data[i + 9 :]
        i += 2 + n
    raise ValueError


def jpeg_insert(data, seg):
    return data[:2] + seg + data[2:]


def seg(marker, payload):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload


def tiff(w, h, bits, spp, photo, compression, strip, extra=(), next_ifd=0, endian="<", sample_format=None, rows=None):
    ents = [
        (256, 4, 1, w),
        (257, 4, 1, h),
        (258, 3, 1, bits),
        (259, 3, 1, compression),
        (262, 3, 1, photo),
        (273, 4, 1, None),
        (277, 3, 1, spp),
        (278, 4, 1, rows or h),
        (279, 4, 1, len(strip)),
    ]
    if sample_format:
        ents.append((339, 3, 1, sample_format))
    ents += list(extra)
    ents.sort()
    n = len(ents)
    off = 8 + 2 + 12 * n + 4
    b = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "I", 8) + struct.pack(endian + "H", n)
    for tag, typ, cnt, val in ents:
        val = off if val is None else val
        v = struct.pack(endian + "HH", val, 0) if (typ == 3 and cnt == 1) else struct.pack(endian + "I", val)
        b += struct.pack(endian + "HHI", tag, typ, cnt) + v
    return b + struct.pack(endian + "I", next_ifd) + strip


def fixed_zip(entries, compression=zipfile.ZIP_DEFLATED):
    """entries: (name, data, unix_mode or None)"""
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w", compression) as z:
        for name, data, mode in entries:
            zi = zipfile.ZipInfo(name, EPOCH)
            zi.filename = name  # keep backslashes, ".." and absolute names as they are
            zi.compress_type = compression
            zi.create_system = 3
            zi.external_attr = (mode or 0o100644) << 16
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                z.writestr(zi, data)
    return b.getvalue()


def fixed_tar(entries, fmt=tarfile.PAX_FORMAT):
    """entries: (name, data, type, linkname, pax)"""
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode="w", format=fmt) as t:
        for name, data, typ, link, pax in entries:
            ti = tarfile.TarInfo(name)
            ti.type, ti.linkname, ti.mtime, ti.mode = typ, link, 0, 0o644
            ti.pax_headers = dict(pax or {})
            data = data or b""
            ti.size = len(data) if typ == tarfile.REGTYPE else 0
            if typ in (tarfile.CHRTYPE, tarfile.BLKTYPE):
                ti.devmajor, ti.devminor = 1, 5
            t.addfile(ti, io.BytesIO(data) if typ == tarfile.REGTYPE else None)
    return b.getvalue()


# ------------------------------------------------------------------ checkpoints without torch
TINY = dict(
    img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, num_classes=4
)  # timm VisionTransformer(**TINY)


def tiny_shapes(dim=8, grid=2, classes=4, depth=1):
    s = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, grid * grid + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        q = f"blocks.{i}."
        s.update(
            {
                q + "norm1.weight": (dim,),
                q + "norm1.bias": (dim,),
                q + "attn.qkv.weight": (3 * dim, dim),
                q + "attn.qkv.bias": (3 * dim,),
                q + "attn.proj.weight": (dim, dim),
                q + "attn.proj.bias": (dim,),
                q + "norm2.weight": (dim,),
                q + "norm2.bias": (dim,),
                q + "mlp.fc1.weight": (4 * dim, dim),
                q + "mlp.fc1.bias": (4 * dim,),
                q + "mlp.fc2.weight": (dim, 4 * dim),
                q + "mlp.fc2.bias": (dim,),
            }
        )
    s.update({"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (classes, dim), "head.bias": (classes,)})
    return s


def tiny_state(seed=0, **kw):
    r = np.random.default_rng(seed)
    return {k: (r.standard_normal(v) * 0.02).astype(np.float32) for k, v in tiny_shapes(**kw).items()}


_ST = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


def st_raw(header, data=b"", n=None, pad=True):
    h = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if pad:
        h += b" " * (-len(h) % 8)
    return struct.pack("<Q", len(h) if n is None else n) + h + data


def st(state, meta=None):
    h, data, off = ({"__metadata__": meta} if meta is not None else {}), [], 0
    for k, v in state.items():
        b = np.ascontiguousarray(v).tobytes()
        h[k] = {"dtype": _ST[v.dtype.name], "shape": list(v.shape), "data_offsets": [off, off + len(b)]}
        data.append(b)
        off += len(b)
    return st_raw(h, b"".join(data))


def _u(s):
    b = s.encode()
    return b"X" + struct.pack("<I", len(b)) + b


def _i(n):
    if 0 <= n < 256:
        return b"K" + bytes([n])
    if -(2**31) <= n < 2**31:
        return b"J" + struct.pack("<i", n)
    b = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(b)]) + b


def _tup(xs):
    return b"(" + b"".join(_i(x) for x in xs) + b"t"


def p_tensor(key, numel, size, stride, offset=0, storage="FloatStorage"):
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + b"("
        + _u("storage")
        + b"ctorch\n"
        + storage.encode()
        + b"\n"
        + _u(key)
        + _u("cpu")
        + _i(numel)
        + b"tQ"
        + _i(offset)
        + _tup(size)
        + _tup(stride)
        + b"\x89"
        + b"ccollections\nOrderedDict\n)R"
        + b"tR"
    )


def p_dict(pairs):
    return b"}(" + b"".join(_u(k) + v for k, v in pairs) + b"u"


def p_call(module, name, arg):  # GLOBAL + REDUCE
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + _u(arg) + b"tR"


def strides(shape):
    s, out = 1, []
    for d in reversed(shape):
        out.append(s)
        s *= d
    return tuple(reversed(out))


def torch_zip(pkl, storages, root="archive", extra=(), compression=zipfile.ZIP_STORED, break_crc=False):
    ents = [(f"{root}/data.pkl", b"\x80\x02" + pkl + b".", None), (f"{root}/byteorder", b"little", None)]
    ents += [(f"{root}/data/{k}", v, None) for k, v in storages.items()]
    ents += [(f"{root}/version", b"3\n", None)] + list(extra)
    return fixed_zip(ents, compression)


def torch_state(state, wrap=None, extra_pairs=()):
    pairs, stor = [], {}
    for i, (k, v) in enumerate(state.items()):
        s = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage", "float16": "HalfStorage"}[
            v.dtype.name
        ]
        stor[str(i)] = np.ascontiguousarray(v).tobytes()
        pairs.append((k, p_tensor(str(i), v.size, v.shape, strides(v.shape), storage=s)))
    body = p_dict(pairs)
    if wrap:
        body = p_dict([(wrap, body)] + list(extra_pairs))
    elif extra_pairs:
        body = p_dict(pairs + list(extra_pairs))
    return torch_zip(body, stor)


def npy(arr_header, data):
    h = arr_header.encode()
    h += b" " * (63 - (10 + len(h)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(h)) + h + data


def npz(members, compression=zipfile.ZIP_DEFLATED):
    return fixed_zip([(k, v, None) for k, v in members], compression)


def vit_config(**over):
    c = dict(
        architectures=["ViTForImageClassification"],
        model_type="vit",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        num_channels=3,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        qkv_bias=True,
        id2label={"0": "a", "1": "b", "2": "c", "3": "d"},
        label2id={"a": 0, "b": 1, "c": 2, "d": 3},
    )
    c.update(over)
    return json.dumps(c, indent=1).encode()


EVIL_PY = "import os\nos.mkdir('%s')\nclass Evil: pass\n"


# ------------------------------------------------------------------ PUBLIC HALF
def public(d):
    o = Out(d, "public")
    J = jpg()
    # --- images that must be accepted, with a machine check
    o.w("image/ok_rgb.jpg", J, "accept", "control", check="size=64x48;tl=red")
    o.w("image/ok_rgb.png", enc(quad(), "PNG"), "accept", "control", check="size=64x48;tl=red")
    for k in (1, 3, 6, 8):
        o.w(
            f"image/exif_orientation_{k}.jpg",
            jpg(oriented(k), exif=exif(k)),
            "accept",
            "EXIF orientation must be applied, the same in train, eval, CLI, server and web page",
            check="size=64x48;tl=red;tr=green;bl=blue",
        )
    o.w("image/gray8.png", enc(quad().convert("L"), "PNG"), "accept", "greyscale", check="size=64x48")
    o.w("image/gray_alpha.png", enc(quad().convert("LA"), "PNG"), "accept", "grey + alpha", check="size=64x48")
    rgba = quad().convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 0))
    o.w(
        "image/rgba_fully_transparent.png",
        enc(rgba, "PNG"),
        "accept",
        "documented rule for alpha (drop or composite), the same everywhere",
        check="size=64x48",
    )
    g16 = (np.arange(64 * 48, dtype=np.uint32).reshape(48, 64) * 21).astype(np.uint16)
    o.w(
        "image/gray16.png",
        enc(Image.fromarray(g16), "PNG"),
        "accept",
        "16-bit grey must be scaled, not clipped to white",
        check="size=64x48;not_constant;mean<200",
    )
    o.w(
        "image/palette.gif",
        enc(quad().convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "accept",
        "palette",
        check="size=64x48;tl=red",
    )
    o.w(
        "image/palette_trns.png",
        enc(quad().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=0),
        "accept",
        "palette with transparency",
        check="size=64x48",
    )
    o.w("image/bilevel.png", enc(quad().convert("1"), "PNG"), "accept", "1-bit", check="size=64x48")
    o.w(
        "image/cmyk.jpg",
        jpg(quad().convert("CMYK")),
        "accept",
        "CMYK must come out in the right colours, not inverted",
        check="size=64x48;tl=red",
    )
    o.w("image/progressive.jpg", jpg(progressive=True), "accept", "progressive", check="size=64x48;tl=red")
    o.w("image/uppercase_ext.JPG", J, "accept", "extension case", check="size=64x48;tl=red")
    o.w(
        "image/png_named_jpg.jpg",
        enc(quad(), "PNG"),
        "accept",
        "mislabelled extension, allowed format",
        check="size=64x48;tl=red",
    )
    o.w("image/one_pixel.png", enc(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"), "accept", "1x1", check="size=1x1")
    o.w(
        "image/wide_4000x1.png",
        enc(Image.new("RGB", (4000, 1), (255, 0, 0)), "PNG"),
        "accept",
        "extreme aspect: 'resize short side to 256' would make 1,024,000 x 256",
        max_mb=200,
        check="size=4000x1",
    )
    f = [noise(i) for i in range(3)]
    o.w(
        "image/animated.gif",
        enc(f[0], "GIF", save_all=True, append_images=f[1:], duration=50, loop=0),
        "accept",
        "documented rule: first frame",
        check="size=64x48",
    )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    srgb = srgb[:24] + b"\x07\xd0\0\1\0\1\0\0\0\0\0\0" + srgb[36:]  # fixed creation date
    o.w("image/icc_srgb.jpg", jpg(icc_profile=srgb), "accept", "valid ICC profile", check="size=64x48;tl=red")
    o.w(
        "image/icc_garbage.jpg",
        jpg(icc_profile=b"\0garbage" * 50),
        "accept",
        "broken ICC must not stop decoding",
        check="size=64x48;tl=red",
    )
    o.w("image/webp_lossy.webp", enc(quad(), "WEBP", quality=90), "accept", "webp", check="size=64x48")
    o.w(
        "image/tiff_multipage.tif",
        enc(quad(), "TIFF", save_all=True, append_images=[noise(9)]),
        "accept",
        "first page",
        check="size=64x48;tl=red",
    )
    o.w("image/trailing_garbage.jpg", J + b"\0" * 4096, "accept", "bytes after EOI", check="size=64x48;tl=red")
    # --- images that must be refused
    o.w("image/zero_byte.jpg", b"", "reject", "empty file")
    o.w("image/text_named.jpg", b"this is not an image\n" * 20, "reject", "text")
    o.w("image/html_named.png", b"<html><script>alert(1)</script></html>", "reject", "html")
    big = jpg(noise(3, 256, 256))
    for pc in (10, 50, 95):
        o.w(
            f"image/truncated_{pc}.jpg",
            big[: len(big) * pc // 100],
            "reject",
            f"cut at {pc} % (never half-grey pixels)",
        )
    P = enc(noise(4, 256, 256), "PNG")
    o.w("image/truncated_50.png", P[: len(P) // 2], "reject", "cut PNG")
    raw = b"".join(b"\0" + bytes(range(64)) * 3 for _ in range(48))
    o.w("image/png_bad_idat_crc.png", png(64, 48, 8, 2, zlib.compress(raw), crc_break=b"IDAT"), "reject", "CRC error")
    o.w(
        "image/bomb_error_30000x30000.png",
        png(30000, 30000, 1, 0, zeros_deflated(3751 * 30000)),
        "reject",
        "900 Mpixel from ~110 kB: above Pillow's 2x limit",
        max_mb=100,
        max_s=0.5,
    )
    o.w(
        "image/bomb_warnzone_13000x13000.png",
        png(13000, 13000, 8, 0, zeros_deflated(13001 * 13000)),
        "reject",
        "169 Mpixel from ~165 kB: Pillow only WARNS here and decodes ~0.5 GB",
        max_mb=100,
        max_s=0.5,
    )
    o.w(
        "image/jpeg_claims_65500x65500.jpg",
        jpeg_set_size(J, 65500, 65500),
        "reject",
        "header lies about size",
        max_mb=100,
        max_s=0.5,
    )
    o.w(
        "image/png_text_bomb.png",
        png(
            4,
            4,
            8,
            0,
            zlib.compress(b"\0\0\0\0\0" * 4),
            extra=chunk(b"zTXt", b"Comment\0\0" + zeros_deflated(64 << 20)),
        ),
        "either",
        "compressed text chunk of 64 MB",
        max_mb=100,
    )
    o.w(
        "image/svg_named.png",
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script><text>&x;</text></svg>',
        "reject",
        "SVG + XXE",
    )
    o.w(
        "image/eps_named.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
        "reject",
        "EPS would start Ghostscript: format allow-list must stop it",
    )
    o.w(
        "image/gif_zip_polyglot.gif",
        enc(quad().convert("P"), "GIF") + fixed_zip([("evil.py", b"print(1)", None)]),
        "either",
        "GIF + ZIP",
    )
    o.w(
        "image/jpeg_comment_html.jpg",
        jpeg_insert(J, seg(0xFE, b"<script>alert(1)</script>")),
        "either",
        "metadata must never reach the web page unescaped",
    )
    # --- file-system oddities (folder given to the trainer)
    for name, why in (
        ("sp ace & quote'.jpg", "shell characters"),
        ("-rf.jpg", "leading dash"),
        ("naïve_写真_🐈.jpg", "unicode"),
        ("<img src=x onerror=alert(1)>.jpg", "HTML in a file name"),
        ("%2e%2e%2fx.jpg", "percent-encoded"),
        ("a" * 251 + ".jpg", "255-byte name"),
    ):
        o.w("fs/names/" + name, J, "accept", why, check="size=64x48")
    o.w(
        "fs/hidden/._resource.jpg",
        b"\0\5\x16\7AppleDouble",
        "reject",
        "macOS resource fork: ignore or report, never crash",
    )
    o.w("fs/hidden/Thumbs.db", b"\xd0\xcf\x11\xe0" * 8, "reject", "Windows thumbnail cache")
    o.w("fs/loop/a/ok.jpg", J, "accept", "inside a directory that also holds a symlink loop")
    _link("..", o.p("fs/loop/a/up"))
    o.note("fs/loop", "either", "symlink loop: every real file exactly once, ends in < 2 s")
    _link("/nonexistent/x.jpg", o.p("fs/broken/broken.jpg"))
    o.note("fs/broken/broken.jpg", "reject", "broken symlink")
    os.makedirs(o.p("fs/dirs/folder.jpg/x")[:-2], exist_ok=True)
    o.note("fs/dirs/folder.jpg", "reject", "directory with an image name")
    if not os.path.lexists(o.p("fs/fifo/pipe.jpg")):
        os.mkfifo(o.p("fs/fifo/pipe.jpg"))
    o.note("fs/fifo/pipe.jpg", "reject", "named pipe: open() must not block")
    o.w("fs/perm/unreadable.jpg", J, "reject", "mode 000 (run the harness as a normal user)")
    os.chmod(o.p("fs/perm/unreadable.jpg"), 0)
    # --- archives
    ev = (J, None)
    o.w(
        "archive/zip_slip.zip",
        fixed_zip([("train/a/ok.jpg", *ev), ("../../evil.jpg", *ev)]),
        "reject",
        "relative traversal",
    )
    o.w("archive/zip_absolute.zip", fixed_zip([("/BADINPUT_CANARY_zipabs.jpg", *ev)]), "reject", "absolute path")
    o.w(
        "archive/zip_symlink.zip",
        fixed_zip([("train/link", b"/etc", stat.S_IFLNK | 0o777), ("train/link/evil.jpg", *ev)]),
        "reject",
        "symlink member",
    )
    o.w(
        "archive/tar_slip.tar",
        fixed_tar([("../evil.jpg", J, tarfile.REGTYPE, "", None)]),
        "reject",
        "relative traversal",
    )
    o.w(
        "archive/tar_symlink_write.tar",
        fixed_tar(
            [("d", None, tarfile.SYMTYPE, "/", None), ("d/BADINPUT_CANARY_tar.jpg", J, tarfile.REGTYPE, "", None)]
        ),
        "reject",
        "symlink then write through it (BentoML CVE-2026-27905 pattern)",
    )
    o.w(
        "archive/zip_bomb_1GB.zip",
        _zip_prebuilt([("train/a/z.jpg", zeros_deflated(1 << 30, level=9), 1 << 30)]),
        "reject",
        "1 GB from ~1 MB",
        max_mb=100,
    )
    o.w("archive/truncated.zip", fixed_zip([("train/a/ok.jpg", *ev)])[:-40], "reject", "central directory cut off")
    o.w(
        "archive/good.zip",
        fixed_zip([(f"train/{c}/{i}.jpg", jpg(noise(i)), None) for c in "ab" for i in range(3)]),
        "accept",
        "control",
        check="files=6",
    )
    # --- checkpoints
    S = tiny_state()
    o.w("ckpt/ok.safetensors", st(S), "accept", "control; fits timm VisionTransformer(**TINY)")
    o.w("ckpt/ok.pth", torch_state(S), "accept", "control: plain state dict in torch zip format")
    o.w(
        "ckpt/pickle_legacy_exec.pth",
        b"\x80\x02" + p_call("posix", "mkdir", CANARY + "legacy") + b".",
        "reject",
        "raw pickle",
    )
    o.w(
        "ckpt/zip_exec.pth",
        torch_zip(p_dict([("a", p_call("posix", "mkdir", CANARY + "zip"))]), {}),
        "reject",
        "torch zip whose pickle calls mkdir",
    )
    o.w(
        "ckpt/zip_exec_named.safetensors",
        torch_zip(p_dict([("a", p_call("posix", "mkdir", CANARY + "named"))]), {}),
        "reject",
        "pickle behind a safe extension: no fall-back by content",
    )
    o.w(
        "ckpt/exec_then_broken.bin",
        b"\x80\x02" + p_call("posix", "mkdir", CANARY + "broken") + b"\xff\xff\xff",
        "reject",
        "runs, then breaks the stream (the 'nullifAI' trick against scanners)",
    )
    pk = b"\x80\x02" + p_call("posix", "mkdir", CANARY + "npz") + b"."
    o.w(
        "ckpt/object_array.npz",
        npz([("w.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pk))]),
        "reject",
        "allow_pickle=False",
    )
    o.w(
        "ckpt/npy_claims_4TB.npz",
        npz([("w.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", b"\0" * 64))]),
        "reject",
        "declared size >> file",
        max_mb=100,
    )
    o.w("ckpt/st_header_len_max.safetensors", st_raw(b"{}", n=2**63 - 1), "reject", "header length 2^63-1")
    o.w("ckpt/st_header_200MB.safetensors", st_raw(b"{}", n=200_000_000), "reject", "header length above 100 MB")
    o.w("ckpt/st_empty.safetensors", b"", "reject", "empty")
    o.w("ckpt/st_truncated.safetensors", st(S)[:-100], "reject", "cut")
    o.w("ckpt/st_trailing.safetensors", st(S) + b"PK\3\4", "reject", "bytes after the buffer")
    o.w(
        "ckpt/st_overlap.safetensors",
        st_raw({f"t{i}": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(1000)}, b"\0" * 16),
        "reject",
        "overlapping tensors",
    )
    o.w(
        "ckpt/st_shape_overflow.safetensors",
        st_raw(
            {"t": {"dtype": "F32", "shape": [4194305, 4194305, 211106198978564], "data_offsets": [0, 16]}}, b"\0" * 16
        ),
        "reject",
        "product overflows 2^64 to 4",
    )
    o.w(
        "ckpt/st_shape_mismatch.safetensors",
        st_raw({"t": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4]}}, b"\0" * 4),
        "reject",
        "shape > bytes",
    )
    nan = {k: v.copy() for k, v in S.items()}
    nan["blocks.0.mlp.fc1.weight"][3, 3] = np.nan
    o.w(
        "ckpt/nan_one.safetensors",
        st(nan),
        "convert",
        "one NaN weight: load must say which tensor (error by default, --allow-nonfinite to go on)",
        check="names=blocks.0.mlp.fc1.weight",
    )
    inf = {k: v.copy() for k, v in S.items()}
    inf["head.bias"][:] = np.inf
    o.w("ckpt/inf_head.safetensors", st(inf), "convert", "Inf weights", check="names=head.bias")
    lacking = dict(S)
    lacking.pop("norm.weight")
    o.w("ckpt/missing_key.safetensors", st(lacking), "reject", "names the missing key", check="names=norm.weight")
    ext = dict(S)
    ext["head2.weight"] = np.zeros((4, 8), np.float32)
    o.w("ckpt/extra_key.safetensors", st(ext), "reject", "names the extra key", check="names=head2.weight")
    o.w(
        "ckpt/head_1000.safetensors",
        st(tiny_state(classes=1000)),
        "convert",
        "other class count: explicit head reset only",
        check="names=head.weight",
    )
    o.w(
        "ckpt/pos_embed_grid4.safetensors",
        st(tiny_state(grid=4)),
        "convert",
        "other grid: documented resampling",
        check="names=pos_embed",
    )
    o.w("ckpt/ddp_prefix.pth", torch_state({"module." + k: v for k, v in S.items()}), "convert", "DDP prefix")
    o.w("ckpt/wrapped_ema.pth", torch_state(S, wrap="state_dict_ema"), "convert", "nested under state_dict_ema")
    o.w(
        "ckpt/index_traversal/model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": 4}, "weight_map": {"cls_token": "../../../../etc/passwd"}}).encode(),
        "reject",
        "shard path leaves the folder",
    )
    # --- configs
    o.w(
        "config/remote_code/config.json",
        vit_config(auto_map={"AutoModelForImageClassification": "evil.Evil", "AutoConfig": "evil.Evil"}),
        "reject",
        "custom code refused",
    )
    o.w("config/remote_code/evil.py", (EVIL_PY % (CANARY + "remote")).encode(), "reject", "must never be imported")
    o.w("config/huge_depth/config.json", vit_config(num_hidden_layers=10**9), "reject", "billion layers", max_mb=100)
    o.w("config/huge_image/config.json", vit_config(image_size=10**6), "reject", "3.9 G tokens", max_mb=100)
    o.w("config/patch_zero/config.json", vit_config(patch_size=0), "reject", "division by zero")
    o.w("config/heads_indivisible/config.json", vit_config(num_attention_heads=3), "reject", "8 % 3 != 0")
    o.w(
        "config/label_xss/config.json",
        vit_config(id2label={"0": "<img src=x onerror=alert(1)>", "1": "b", "2": "c", "3": "d"}),
        "accept",
        "label must be escaped in the web page, the CLI table and the model card",
    )
    # --- dataset layouts
    for c, ims in (("cat", 4), ("dog", 4)):
        for i in range(ims):
            o.w(
                f"dataset/half_bad/train/{c}/{i}.jpg",
                jpg(noise(i)) if i % 2 else big[:200],
                "accept" if i % 2 else "reject",
                "half of all files are bad",
            )
    os.makedirs(o.p("dataset/empty_class/train/none/x")[:-2], exist_ok=True)
    o.w(
        "dataset/empty_class/train/cat/0.jpg",
        J,
        "accept",
        "sibling class folder is empty: must be reported, class indices must not shift between train and val",
    )
    o.note("dataset/empty_class", "either", "empty class folder")
    o.w(
        "dataset/csv/labels.csv",
        b'\xef\xbb\xbfpath,label\r\n../../etc/passwd,a\r\n0.jpg,=HYPERLINK("x")\r\nmissing.jpg,a\r\n0.jpg,a\r\n0.jpg,b\r\n',
        "reject",
        "BOM, traversal, formula, missing file, duplicate with another label: each row named",
    )
    # --- http
    _http(o, J, _http_public(J))
    # --- training faults (recipes for the fault-injection harness, not files)
    _train(
        o,
        [
            ("kill9_random", "SIGKILL after a uniform random delay in [0, 2 x save interval], 200 times"),
            ("enospc_tmpfs", "checkpoint dir on a tmpfs of 1.5 x checkpoint size"),
            ("truncate_last", "cut the newest checkpoint at 50 %"),
            ("sigterm_step", "SIGTERM in the middle of a step"),
            ("nan_batch", "one batch of NaN pixels at step 17"),
            ("worker_kill", "SIGKILL one data-loader worker"),
        ],
    )
    return o.done()


def _link(target, path):
    if not os.path.lexists(path):
        os.symlink(target, path)


def _zip_prebuilt(members):
    """ZIP from already-deflated (zlib) members: (name, zlib_data, raw_size). CRC of zeros is computed in blocks."""
    out, cd, off = b"", b"", 0
    for name, z, size in members:
        raw = z[2:-4]
        crc, left, zb = 0, size, b"\0" * (1 << 20)
        while left:
            n = min(left, 1 << 20)
            crc = zlib.crc32(zb[:n], crc)
            left -= n
        n = name.encode()
        common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, crc & 0xFFFFFFFF, len(raw), size, len(n), 0)
        loc = b"PK\3\4" + common + n + raw
        cd += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, off) + n
        out += loc
        off += len(loc)
    return out + cd + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(cd), off, 0)


def _train(o, recipes):
    o.w(
        "train/recipes.json",
        json.dumps([dict(name=n, how=h) for n, h in recipes], indent=1).encode(),
        "either",
        "fault-injection recipes",
        family="train",
    )


def _http(o, J, cases):
    """Requests as data. body: utf8 | b64 | gen. expect: list of status codes; 'closed' = connection closed by server."""
    never = [
        "0x[0-9a-f]{6,}",
        "Traceback",
        "/site-packages/",
        "/(home|root|tmp)/",
    ]  # memory addresses (vLLM CVE-2026-22778), stack traces, paths
    for c in cases:
        c.setdefault("forbid_body_regex", never)
    o.w(
        "http/cases.json",
        json.dumps(cases, indent=1).encode(),
        "either",
        f"{len(cases)} HTTP requests with the answers allowed",
        family="http",
    )


def _http_public(J):
    b64 = base64.b64encode(J).decode()
    cases = [
        dict(
            name="ok_image",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "image/jpeg"},
            b64=b64,
            expect=[200],
        ),
        dict(
            name="dns_rebinding_host",
            method="GET",
            path="/v1/models",
            headers={"Host": "evil.example:8000"},
            expect=[400, 403, 421],
        ),
        dict(
            name="cross_origin_simple_post",
            method="POST",
            path="/v1/predict",
            headers={"Origin": "https://evil.example", "Content-Type": "text/plain"},
            utf8="x",
            expect=[400, 403, 415],
        ),
        dict(
            name="cors_preflight",
            method="OPTIONS",
            path="/v1/predict",
            headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
            expect=[204, 400, 403, 405],
            forbid_header={"Access-Control-Allow-Origin": ["*", "https://evil.example"]},
        ),
        dict(
            name="ssrf_metadata",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "application/json"},
            utf8='{"image_url":"http://169.254.169.254/latest/meta-data/"}',
            expect=[400, 403, 422],
        ),
        dict(
            name="ssrf_localhost",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "application/json"},
            utf8='{"image_url":"http://127.0.0.1:22/"}',
            expect=[400, 403, 422],
        ),
        dict(
            name="file_url",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "application/json"},
            utf8='{"image_url":"file:///etc/passwd"}',
            expect=[400, 403, 422],
        ),
        dict(
            name="local_path_as_image",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "application/json"},
            utf8='{"image":"/etc/passwd"}',
            expect=[400, 422],
        ),
        dict(name="model_traversal", method="GET", path="/v1/models/..%2f..%2f..%2fetc%2fpasswd", expect=[400, 404]),
        dict(
            name="body_too_large",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "image/jpeg"},
            gen="zeros:268435456",
            expect=[413, "closed"],
        ),
        dict(
            name="broken_image_body",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "image/jpeg"},
            utf8="not an image",
            expect=[400, 415, 422],
        ),
        dict(
            name="one_pixel_image",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "image/png"},
            b64=base64.b64encode(enc(Image.new("RGB", (1, 1)), "PNG")).decode(),
            expect=[200, 400, 422],
        ),
        dict(
            name="top_k_huge",
            method="POST",
            path="/v1/predict?top_k=1000000000",
            headers={"Content-Type": "image/jpeg"},
            b64=b64,
            expect=[200, 400, 422],
        ),
        dict(
            name="top_k_negative",
            method="POST",
            path="/v1/predict?top_k=-1",
            headers={"Content-Type": "image/jpeg"},
            b64=b64,
            expect=[400, 422],
        ),
        dict(
            name="json_depth_20000",
            method="POST",
            path="/v1/predict",
            headers={"Content-Type": "application/json"},
            gen="json_nest:20000",
            expect=[400, 413, 422],
        ),
        dict(
            name="slow_loris_headers",
            raw="GET / HTTP/1.1\r\nHost: localhost\r\nX-a: ",
            drip="1 byte / 5 s, 500 connections",
            expect=["closed", 408],
            max_s=60,
        ),
        dict(
            name="queue_overload",
            gen="500 concurrent ok_image for 30 s",
            expect=[200, 429, 503],
            need_header_on=dict(status=[429, 503], header="Retry-After"),
        ),
    ]
    return cases


def _selftest(d):
    import collections
    import shutil
    import time

    for half in ("public",):
        fn = globals().get(half)
        if fn is None:
            continue
        runs = []
        for k in (1, 2):
            t = os.path.join(d, f"{half}{k}")
            shutil.rmtree(t, ignore_errors=True)
            t0 = time.time()
            runs.append((fn(t), time.time() - t0))
        a, b = [{i["path"]: i.get("sha256") for i in r[0]} for r in runs]
        diff = [k for k in a if a[k] != b.get(k)]
        fam = collections.Counter(i["family"] for i in runs[0][0])
        exp = collections.Counter(i["expect"] for i in runs[0][0])
        print(
            half,
            len(runs[0][0]),
            "items",
            dict(fam),
            dict(exp),
            "seconds",
            [round(r[1], 1) for r in runs],
            "NOT deterministic:" if diff else "deterministic",
            diff,
        )
        assert not diff
        dup = [k for k, n in collections.Counter(i["path"] for i in runs[0][0]).items() if n > 1]
        assert not dup, dup
        http = json.load(open(os.path.join(d, half + "1", "http/cases.json")))
        print(
            "   http cases",
            len(http),
            " train recipes",
            len(json.load(open(os.path.join(d, half + "1", "train/recipes.json")))),
        )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("public", "selftest"):
        sys.exit(__doc__)
    {"public": public, "selftest": _selftest}[sys.argv[1]](sys.argv[2])
