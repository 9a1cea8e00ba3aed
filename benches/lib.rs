//! Measurements: `cargo bench -p unimo-benches` times the runtime's pieces (criterion); `search-speed` measures searches, their
//! memory and recall; `gate-saving` what `unimo watch` need not caption; `peers` runs a bundle's graphs in other runtimes beside ours;
//! `peer/caption.py` captions in Python.
