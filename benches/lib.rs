//! Criterion benchmarks of the runtime's pieces: `cargo bench -p unimo-benches`.
