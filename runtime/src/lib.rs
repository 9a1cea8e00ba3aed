//! The on-device runtime of UNIMO: captions pictures and finds them by words, offline.
//!
//! This crate owns the contract between training and serving: how a picture becomes a tensor ([`image`]), how text
//! becomes ids ([`tokenizer`]) and what a bundle is ([`bundle`]). The trainer and the exporter use those very
//! functions. [`model::Model`] opens a bundle on an [`engine`] and captions, embeds and matches.

#![deny(unsafe_code)]

pub mod bundle;
pub mod captioning;
pub mod engine;
#[cfg(feature = "gallery")]
pub mod gallery;
pub mod image;
#[cfg(feature = "tract")]
mod kernels;
pub mod lanes;
mod map;
pub mod model;
pub mod ordered;
pub mod reranking;
#[cfg(feature = "tract")]
pub mod roofline;
pub mod tokenizer;
#[cfg(all(unix, feature = "watch"))]
pub mod watch;
