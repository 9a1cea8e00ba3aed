//! From a trainer's checkpoint to the bundle that a board runs: ONNX graphs, shared weights, a parity check.

pub mod backbone_file;
pub mod calibrate;
pub mod checkpoint;
pub mod compensate;
pub mod export;
pub mod forms;
pub mod from_bundle;
pub mod gate;
pub mod graph;
pub mod graphs;
pub mod parity;
pub mod quality;
pub mod quantize;
pub mod sample;
mod stored;
pub mod tensorrt;
pub mod upgrade;
mod walk;
mod writing;
