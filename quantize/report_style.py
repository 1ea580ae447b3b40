"""The style sheet of the report page: light and dark, as the reader's system is set."""

STYLE = """
:root{color-scheme:light dark;--text:#1c2430;--soft:#5b6675;--line:#dfe3e8;--back:#fff;--panel:#f6f7f9;
--c0:#7b8794;--c1:#1f6fb2;--c2:#c2570c;--c3:#2f855a;--c4:#8a4fbf}
@media(prefers-color-scheme:dark){:root{--text:#e4e8ee;--soft:#9aa5b4;--line:#333c48;--back:#14181d;--panel:#1c2229;
--c0:#9aa5b4;--c1:#5aa9e6;--c2:#f0924c;--c3:#5fbf8f;--c4:#b88be0}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:800px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
section{border-top:1px solid var(--line)}p{margin:.4rem 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:.6rem;margin:0 0 1rem}
.facts div{background:var(--panel);border-radius:6px;padding:.5rem .7rem}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:.5rem 0;font-size:.88rem}
td,th{text-align:left;padding:.2rem .9rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
svg{display:block;max-width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:10.5px}.middle{text-anchor:middle}.right{text-anchor:end}
svg path{fill:none}.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
svg .s0,svg .s1,svg .s2,svg .s3,svg .s4{stroke-width:1.6}svg circle{fill:var(--back)}
.dashed{stroke-dasharray:4 3}.f0{fill:var(--c0)}.f1{fill:var(--c1)}
.legend{font-size:.85rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:center}
.legend i{display:inline-block;width:14px;height:10px;margin-right:.35rem;background:var(--c0)}
.legend .ramp i{margin:0;width:18px}.legend .s1,.legend .f1{background:var(--c1)}.legend .s2{background:var(--c2)}
.legend .s3{background:var(--c3)}.legend .s4{background:var(--c4)}
.small{display:flex;flex-wrap:wrap;gap:.8rem}.small figure{max-width:375px}figure{margin:0}
figcaption{font-size:.85rem;color:var(--soft)}
details{margin:.4rem 0}pre{font-size:.8rem;background:var(--panel);padding:.6rem;overflow:auto;max-height:24rem}
@media print{section{break-inside:avoid}}
"""
