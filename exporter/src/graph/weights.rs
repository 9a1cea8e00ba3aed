//! The weights that all graphs of one precision share, stored once.

use std::collections::BTreeMap;

use half::f16;
use half::slice::HalfFloatSliceExt;
use unimo::bundle::manifest::Precision;

/// Name of the file beside the graphs.
pub(super) const FILE: &str = "weights.bin";
/// Tensors start at multiples of this, so that they can be used where they lie.
const ALIGNMENT: usize = 64;

/// Where a weight lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredWeight {
    /// Shape.
    pub shape: Vec<usize>,
    /// First byte.
    pub offset: usize,
    /// Number of bytes.
    pub length: usize,
    /// Whether the elements are 16-bit floats, not 32-bit ones.
    pub half: bool,
}

/// Weights by name, laid out in one file.
pub struct WeightStore {
    precision: Precision,
    entries: BTreeMap<String, StoredWeight>,
    bytes: Vec<u8>,
}

impl WeightStore {
    /// An empty store; `precision` is f32 or f16.
    #[must_use]
    pub fn new(precision: Precision) -> Self {
        Self { precision, entries: BTreeMap::new(), bytes: Vec::new() }
    }

    /// How the weights are stored.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Adds a weight under a new name. Vectors (biases, LayerNorm) stay in 32 bits at every precision: they are few, and
    /// errors in them add up.
    pub fn add(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.store(name, shape, values, self.precision == Precision::F16 && shape.len() > 1);
    }

    /// Adds a weight that stays in 32 bits at every precision.
    pub fn add_exact(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.store(name, shape, values, false);
    }

    fn store(&mut self, name: &str, shape: &[usize], values: &[f32], half: bool) {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let offset = self.bytes.len();
        if half {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            self.bytes.extend(halves.iter().flat_map(|v| v.to_le_bytes()));
        } else {
            self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        let entry = StoredWeight { shape: shape.to_vec(), offset, length: self.bytes.len() - offset, half };
        self.entries.insert(name.to_owned(), entry);
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

/// Values as they are after storing in 16 bits.
#[must_use]
pub fn round_to_f16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| f16::from_f32(v).to_f32()).collect()
}
