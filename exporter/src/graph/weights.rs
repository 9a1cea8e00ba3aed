//! The weights that all graphs of one precision share, stored once.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use half::f16;
use half::slice::HalfFloatSliceExt;
use unimo::bundle::manifest::Precision;

use crate::compensate::{self, Moments};
use crate::quantize::{BLOCK, Blocks, Quantized, dequantize, dequantize_blocks, quantize, quantize_blocks};

/// Tensors start at multiples of this, so that they can be used where they lie.
const ALIGNMENT: usize = 64;
/// Channels of fewer values are stored in 16 bits where others are in 8: depthwise kernels have nine, for which a scale would
/// cost half of what it saves.
const LEAST_CHANNEL: usize = 32;
/// Beginning of the names of the matrices that are stored in 4 bits where any are: all rows of the layers meet them, at every token.
const LAYERS: &str = "layers.";

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
    /// 4-bit levels of a matrix, to be multiplied by the 16-bit scales of [`WeightStore::scales_of`]: one for each [`BLOCK`] inputs of an
    /// output.
    I4 {
        /// The axis of the outputs.
        axis: usize,
    },
}

/// How the weights of one precision are stored.
#[derive(Debug, Clone)]
pub struct Storage {
    /// The precision.
    pub precision: Precision,
    /// Beginnings of the names of weights that 8- and 4-bit precision keep in 16 bits, because what depends on them would lose too
    /// much.
    pub keep_f16: Vec<String>,
    /// What weights are multiplied with, by which 4-bit ones are rounded; others, and without it all, are rounded by themselves.
    pub moments: Option<Arc<Moments>>,
}

impl Storage {
    /// The storage of a precision, with nothing kept and nothing known.
    #[must_use]
    pub fn of(precision: Precision) -> Self {
        Self { precision, keep_f16: Vec::new(), moments: None }
    }

    /// How a weight is stored whose channels lie along `axis`. Vectors (biases, LayerNorm) stay in 32 bits: they are few, and
    /// errors in them add up.
    #[must_use]
    pub fn element(&self, name: &str, shape: &[usize], axis: usize) -> Element {
        let values = shape.iter().product::<usize>();
        let kept = self.keep_f16.iter().any(|beginning| name.starts_with(beginning.as_str()));
        match self.precision {
            _ if shape.len() < 2 => Element::F32,
            Precision::F32 => Element::F32,
            Precision::F16 => Element::F16,
            Precision::I8 | Precision::I4 if kept || values < LEAST_CHANNEL * shape[axis] => Element::F16,
            Precision::I4 if name.starts_with(LAYERS) && shape[1 - axis].is_multiple_of(BLOCK) => Element::I4 { axis },
            Precision::I8 | Precision::I4 => Element::I8 { axis },
        }
    }

    /// A weight's values as they are after storing them; its channels lie along `axis`.
    ///
    /// # Errors
    /// Moments that do not fit.
    pub fn rounded(&self, name: &str, values: &[f32], shape: &[usize], axis: usize) -> Result<Vec<f32>> {
        Ok(match self.element(name, shape, axis) {
            Element::F32 => values.to_vec(),
            Element::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
            Element::I8 { axis } => dequantize(&quantize(values, shape, axis), shape, axis),
            Element::I4 { axis } => {
                let rows = dequantize_blocks(&self.blocks(name, values, shape, axis)?);
                if axis == 0 { rows } else { transposed(&rows, &[shape[1], shape[0]]) }
            }
        })
    }

    /// A matrix in 4 bits, whose outputs lie along `axis`.
    fn blocks(&self, name: &str, values: &[f32], shape: &[usize], axis: usize) -> Result<Blocks> {
        let turned = (axis == 1).then(|| transposed(values, shape));
        let rows = turned.as_deref().unwrap_or(values);
        match self.moments.as_ref().and_then(|moments| moments.get(name)) {
            Some(moments) => compensate::quantize(rows, moments).with_context(|| format!("weight `{name}`")),
            None => Ok(quantize_blocks(rows)),
        }
    }
}

/// A matrix `[rows, columns]` as `[columns, rows]`.
pub(crate) fn transposed(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let (rows, columns) = (shape[0], shape[1]);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
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
    ///
    /// # Errors
    /// Moments that do not fit.
    pub fn add(&mut self, name: &str, shape: &[usize], axis: usize, values: &[f32]) -> Result<()> {
        self.store(name, shape, values, self.storage.element(name, shape, axis))
    }

    /// Adds a weight that stays in 32 bits at every precision.
    ///
    /// # Errors
    /// None.
    pub fn add_exact(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<()> {
        self.store(name, shape, values, Element::F32)
    }

    /// Weights that lie in a file already.
    #[must_use]
    pub fn of_file(storage: Storage, entries: BTreeMap<String, StoredWeight>, bytes: Vec<u8>) -> Self {
        Self { storage, entries, bytes }
    }

    fn store(&mut self, name: &str, shape: &[usize], values: &[f32], element: Element) -> Result<()> {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let offset = self.bytes.len();
        let mut scales = None;
        match element {
            Element::I4 { axis } => {
                let blocks = self.storage.blocks(name, values, shape, axis)?;
                self.bytes.extend(blocks.levels);
                scales = Some((blocks.scales.iter().map(|scale| scale.to_f32()).collect(), Element::F16));
            }
            Element::F32 => self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Element::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                self.bytes.extend(halves.iter().flat_map(|v| v.to_le_bytes()));
            }
            Element::I8 { axis } => {
                let quantized = quantize(values, shape, axis);
                self.bytes.extend(quantized.levels.iter().map(|level| level.cast_unsigned()));
                scales = Some((quantized.scales, Element::F32));
            }
        }
        let entry = StoredWeight { shape: shape.to_vec(), offset, length: self.bytes.len() - offset, element };
        self.entries.insert(name.to_owned(), entry);
        if let Some((scales, element)) = scales {
            self.store(&Self::scales_of(name), &[scales.len()], &scales, element)?;
        }
        Ok(())
    }

    /// Name under which the scales of an 8- or 4-bit weight are stored.
    #[must_use]
    pub fn scales_of(name: &str) -> String {
        format!("{name}.scale")
    }

    /// A weight's place.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&StoredWeight> {
        self.entries.get(name)
    }

    /// A weight's values, as they are after storing them.
    ///
    /// # Errors
    /// No such weight, or bytes that are not what its shape needs.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let stored = self.get(name).with_context(|| format!("there is no weight `{name}`"))?;
        let read = || -> Result<Vec<f32>> {
            let end = stored.offset.checked_add(stored.length).context("a range beyond memory")?;
            let bytes = self.bytes.get(stored.offset..end).context("lies outside the weights")?;
            let scales = || self.values(&Self::scales_of(name));
            let values = match stored.element {
                Element::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
                Element::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
                Element::I8 { axis } => {
                    let levels = bytes.iter().map(|b| b.cast_signed()).collect();
                    let quantized = Quantized { levels, scales: scales()? };
                    if quantized.scales.len() != stored.shape[axis] {
                        bail!("{} scales for {} channels", quantized.scales.len(), stored.shape[axis]);
                    }
                    dequantize(&quantized, &stored.shape, axis)
                }
                Element::I4 { axis } => {
                    let scales: Vec<f16> = scales()?.into_iter().map(f16::from_f32).collect();
                    if scales.len() * BLOCK != 2 * bytes.len() {
                        bail!("{} scales for {} levels", scales.len(), 2 * bytes.len());
                    }
                    let rows = dequantize_blocks(&Blocks { levels: bytes.to_vec(), scales });
                    let of_rows = [stored.shape[axis], stored.shape[1 - axis]];
                    if axis == 0 || rows.len() != of_rows[0] * of_rows[1] { rows } else { transposed(&rows, &of_rows) }
                }
            };
            if values.len() != stored.shape.iter().product::<usize>() {
                bail!("{} values, expected {:?}", values.len(), stored.shape);
            }
            Ok(values)
        };
        read().with_context(|| format!("weight `{name}`"))
    }

    /// The file's content.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
