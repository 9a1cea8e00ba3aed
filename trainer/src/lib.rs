//! Training of the UNIMO image–text model (arXiv 2012.15409): data, tokenizer, objectives, fine-tuning, evaluation.

pub mod ablation;
pub mod averaging;
pub mod backbone;
pub mod checkpoint;
pub mod corpus;
pub mod evaluation;
pub mod features;
pub mod metrics;
pub mod model;
pub mod objectives;
pub mod ops;
pub mod optimizer;
pub mod recipe;
pub mod report;
pub mod retrieval;
pub mod rewriting;
pub mod scenes;
pub mod seed;
pub mod shards;
pub mod tasks;
pub mod tfidf;
pub mod tokenizer_training;
pub mod training;
pub mod vision;
pub mod work_files;
