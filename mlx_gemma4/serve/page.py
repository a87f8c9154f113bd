"""The page at `/`: one document, with its libraries in it, that can load nothing else."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parent / "web"
LIBRARY = re.compile(r'<script src="([\w.-]+)"></script>')
STYLE = re.compile(r'<link rel="stylesheet" href="([\w.-]+)">')
FONT = re.compile(r"url\('([\w.-]+)'\)")
SCRIPT = re.compile(r"<script(?: [^>]*)?>(.*?)</script>", re.DOTALL)
# Scripts run by their hashes alone, so that nothing a message holds is ever one; styles, which formulas need, run none.
POLICY = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src blob: data:; media-src blob:; "
    "font-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types page"
)


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The document, and the headers that it is to be sent with."""
    text = read("index.html")
    text = LIBRARY.sub(lambda found: f"<script>{read(found[1])}</script>", text)
    text = STYLE.sub(lambda found: f"<style>{read(found[1])}</style>", text)
    text = FONT.sub(lambda found: f"url('data:font/woff2;base64,{base64_of((FOLDER / found[1]).read_bytes())}')", text)
    digests = [base64_of(sha256(script.encode()).digest()) for script in SCRIPT.findall(text)]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return text.encode(), {
        "Content-Security-Policy": POLICY.format(hashes=hashes),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def base64_of(data: bytes) -> str:
    return b64encode(data).decode()
