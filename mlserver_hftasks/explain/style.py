"""How heat maps look; the colours are those of `scale`."""

STYLE = """
.hft{--for:230,97,0;--against:26,110,235;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
max-width:62rem;margin:0 0 1rem;
padding:1rem 1.25rem;border:1px solid rgba(128,128,128,.35);border-radius:10px}
.hft h2{font-size:1.05rem;font-weight:400;margin:0;display:inline-block}
.hft h2 b{font-size:1.15rem}
.hft dl{display:flex;flex-wrap:wrap;gap:.1rem 1.5rem;margin:.35rem 0 .6rem;font-size:.85rem}
.hft dl div{display:flex;gap:.4rem}
.hft dt{opacity:.7}.hft dd{margin:0;font-variant-numeric:tabular-nums}
.hft .text{font-size:1.12rem;line-height:2.5;margin:.2rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
.hft mark{color:inherit;border-radius:4px;padding:.12em .16em;margin:0 -.04em;white-space:pre-wrap}
.hft .answer{font-weight:600;outline:1.5px solid currentColor;border-radius:3px;padding:0 .1em;margin:0 .12em}
.hft .for{border-bottom:2px solid rgba(var(--for),.9)}
.hft .against{border-bottom:2px dashed rgba(var(--against),.95)}
.hft rt{font-size:.62em;font-variant-numeric:tabular-nums;opacity:.85;letter-spacing:-.01em;
padding-bottom:.35em;line-height:1}
.hft .legend{display:flex;align-items:center;gap:.6rem;font-size:.8rem;margin:.5rem 0 .7rem}
.hft .legend i{flex:0 1 14rem;height:.8rem;border-radius:4px;background:linear-gradient(90deg,
rgba(var(--against),.6),rgba(var(--against),0) 50%,rgba(var(--for),0) 50%,rgba(var(--for),.6))}
.hft table{border-collapse:collapse;font-size:.85rem;text-align:left}
.hft caption{text-align:left;opacity:.7;font-size:.8rem;padding:.2rem 0}
.hft th,.hft td{padding:.1rem .9rem .1rem 0;font-weight:400;background:none;border:0;text-align:left}
.hft td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.hft td.bar{width:16rem;padding:0}
.hft td.bar i{display:block;height:.7rem;border-radius:3px}
.hft details summary{cursor:pointer;font-size:.8rem;opacity:.75;margin:.3rem 0}
.hft .warn{margin:.3rem 0 .6rem;padding:.4rem .7rem;border-left:4px solid #b58900;
background:rgba(181,137,0,.14);font-size:.88rem}
.hft footer{font-size:.78rem;opacity:.65;margin-top:.5rem}
"""
PAGE_STYLE = (
    ":root{color-scheme:light dark}body{margin:1.5rem auto;max-width:64rem;padding:0 1rem;"
    "background:Canvas;color:CanvasText}h1{font:600 1.2rem system-ui,sans-serif}"
)
