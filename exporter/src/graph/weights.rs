//! The weights that all graphs of one precision share, stored once.

use std::collections::BTreeMap;

use half::f16;
use half::slice::HalfFloatSliceExt;
use unimo::bundle::manifest::Precision;

use crate::quantize::{dequantize, quantize};

/// Tensors start at multiples of this, so that they can be used where they lie.
const ALIGNMENT: usize = 64;
/// Channels of fewer values are stored in 16 bits where others are in 8: depthwise kernels have nine, for which a scale would
/// cost half of what it saves.
const LEAST_CHANNEL: usize = 32;

/// How a weight's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit levels, to be multiplied by the scales of [`WeightStore::scales_of`] along one axis.
    I8 {
        /// The axis of the channels.
        axis: usize,
    },
}

/// How the weights of one precision are stored.
#[derive(Debug, Clone)]
pub struct Storage {
    /// The precision.
    pub precision: Precision,
    /// Beginnings of the names of weights that 8-bit precision keeps in 16 bits, because what depends on them would lose too
    /// much.
    pub keep_f16: Vec<String>,
}

impl Storage {
    /// How a weight is stored whose channels lie along `axis`. Vectors (biases, LayerNorm) stay in 32 bits: they are few, and
    /// errors in them add up.
    #[must_use]
    pub fn element(&self, name: &str, shape: &[usize], axis: usize) -> Element {
        let values = shape.iter().product::<usize>();
        let kept = self.keep_f16.iter().any(|beginning| name.starts_with(beginning.as_str()));
        match self.precision {
            _ if shape.len() < 2 => Element::F32,
            Precision::F32 => Element::F32,
            Precision::I8 if values >= LEAST_CHANNEL * shape[axis] && !kept => Element::I8 { axis },
            Precision::F16 | Precision::I8 => Element::F16,
        }
    }
}

impl Element {
    /// Values as they are after storing them so.
    #[must_use]
    pub fn rounded(self, values: &[f32], shape: &[usize]) -> Vec<f32> {
        match self {
            Self::F32 => values.to_vec(),
            Self::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
            Self::I8 { axis } => dequantize(&quantize(values, shape, axis), shape, axis),
        }
    }
}

/// Where a weight lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWeight {
    /// Shape.
    pub shape: Vec<usize>,
    /// First byte.
    pub offset: usize,
    /// Number of bytes.
    pub length: usize,
    /// How its elements are stored.
    pub element: Element,
}

/// Weights by name, laid out in one file.
pub struct WeightStore {
    storage: Storage,
    entries: BTreeMap<String, StoredWeight>,
    bytes: Vec<u8>,
}

impl WeightStore {
    /// An empty store.
    #[must_use]
    pub fn new(storage: Storage) -> Self {
        Self { storage, entries: BTreeMap::new(), bytes: Vec::new() }
    }

    /// Adds a weight under a new name, stored as [`Storage::element`] says; its channels lie along `axis`.
    pub fn add(&mut self, name: &str, shape: &[usize], axis: usize, values: &[f32]) {
        self.store(name, shape, values, self.storage.element(name, shape, axis));
    }

    /// Adds a weight that stays in 32 bits at every precision.
    pub fn add_exact(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.store(name, shape, values, Element::F32);
    }

    /// Weights that lie in a file already.
    #[must_use]
    pub fn of_file(storage: Storage, entries: BTreeMap<String, StoredWeight>, bytes: Vec<u8>) -> Self {
        Self { storage, entries, bytes }
    }

    fn store(&mut self, name: &str, shape: &[usize], values: &[f32], element: Element) {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let offset = self.bytes.len();
        let mut scales = None;
        match element {
            Element::F32 => self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Element::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                self.bytes.extend(halves.iter().flat_map(|v| v.to_le_bytes()));
            }
            Element::I8 { axis } => {
                let quantized = quantize(values, shape, axis);
                self.bytes.extend(quantized.levels.iter().map(|level| level.cast_unsigned()));
                scales = Some(quantized.scales);
            }
        }
        let entry = StoredWeight { shape: shape.to_vec(), offset, length: self.bytes.len() - offset, element };
        self.entries.insert(name.to_owned(), entry);
        if let Some(scales) = scales {
            self.store(&Self::scales_of(name), &[scales.len()], &scales, Element::F32);
        }
    }

    /// Name under which the scales of an 8-bit weight are stored.
    #[must_use]
    pub fn scales_of(name: &str) -> String {
        format!("{name}.scale")
    }

    /// A weight's place.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&StoredWeight> {
        self.entries.get(name)
    }

    /// The file's content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
