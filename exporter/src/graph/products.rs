//! Products with stored weights, in each of the forms that a bundle may hold.

use std::collections::BTreeMap;

use tract_onnx::pb::tensor_proto::DataType;
use unimo::bundle::manifest::{Dtype, Size, TensorSignature};

use super::operators::{Built, product_shape, refuse};
use super::{Attribute, Dim, Element, GraphBuilder, GraphError, Value, WeightStore};
use crate::quantize::BLOCK;

/// Scales of what 8-bit weights of one graph are multiplied with, by the weight's name: `value ≈ level · scale`, levels from −128
/// to 127.
pub type Scales = BTreeMap<String, f32>;

/// How products with 8-bit weights are written; products with wider ones are always in floats. 4-bit ones are [`BLOCKS`] nodes, in
/// floats too but in [`Self::Dynamic`].
#[derive(Debug, Clone, Copy)]
pub enum Products<'a> {
    /// In floats, the weight behind a `DequantizeLinear`.
    Expanded,
    /// The other side quantized as it comes: `DynamicQuantizeLinear`, `MatMulInteger`. Convolutions stay in floats.
    Dynamic,
    /// Both sides behind a `DequantizeLinear`, the other one quantized by a fixed scale. The output layer, whose matrix is the
    /// token table transposed, stays in floats: TensorRT wants a quantized weight right before its product.
    Static(&'a Scales),
    /// In floats; what [`Self::Static`] would quantize is an output of the graph too, called [`OBSERVED`] and the weight's name.
    Observed,
}

/// ONNX Runtime's product with a 4-bit matrix.
pub(super) const BLOCKS: &str = "MatMulNBits";

/// Beginning of the names of outputs that calibration reads.
pub const OBSERVED: &str = "observed/";

impl GraphBuilder<'_> {
    /// How a weight is stored.
    pub(super) fn element(&self, weight: &str) -> Result<Element, GraphError> {
        Ok(self.weights.get(weight).ok_or_else(|| GraphError::MissingWeight(weight.to_owned()))?.element)
    }

    /// `x · W` of the weight `W` `[in, out]`, or `x · Wᵀ` of a `transposed` one `[out, in]`.
    ///
    /// # Errors
    /// No such weight, shapes that do not fit, or no scale where one is needed.
    pub fn product(&mut self, x: &Value, weight: &str, transposed: bool) -> Built {
        let outputs = if transposed { 0 } else { 1 };
        match self.element(weight)? {
            Element::I4 { axis } if axis == outputs => return self.block_product(x, weight, axis),
            Element::I8 { axis } if axis == outputs && matches!(self.products, Products::Dynamic) => {
                return self.dynamic_product(x, weight, transposed);
            }
            _ => {}
        }
        let x = &if transposed { x.clone() } else { self.entering(x, weight, outputs)? };
        let mut w = self.weight(weight)?;
        if transposed {
            w = self.transpose(&w, &[1, 0])?;
        }
        self.matmul(x, &w)
    }

    /// `x · W` of a 4-bit matrix, whose outputs lie along `axis`.
    fn block_product(&mut self, x: &Value, weight: &str, axis: usize) -> Built {
        let (levels, _) = self.stored(weight)?;
        let scales = self.weight(&WeightStore::scales_of(weight))?;
        let [inputs, outputs] = [levels.shape[1 - axis], levels.shape[axis]];
        let shape = product_shape(&x.shape, &[inputs, outputs])?;
        let size = |dim: Dim| Attribute::Int(dim.fixed().unwrap_or_default() as i64);
        // What the other side is rounded to: 1 is not at all, 4 is to 8 bits.
        let accuracy = if matches!(self.products, Products::Dynamic) { 4 } else { 1 };
        let attributes = [
            ("K", size(inputs)),
            ("N", size(outputs)),
            ("bits", Attribute::Int(4)),
            ("block_size", Attribute::Int(BLOCK as i64)),
            ("accuracy_level", Attribute::Int(accuracy)),
        ];
        Ok(self.node(BLOCKS, &[x, &levels, &scales], &attributes, shape, Dtype::F32))
    }

    /// `Σ xᵢ·wᵢⱼ = Σ (levelᵢ − zero)·levelᵢⱼ · scale · scaleⱼ`, the sum in integers.
    fn dynamic_product(&mut self, x: &Value, weight: &str, transposed: bool) -> Built {
        let (mut levels, _) = self.stored(weight)?;
        let (scales, _) = self.stored(&WeightStore::scales_of(weight))?;
        if transposed {
            levels = self.transpose(&levels, &[1, 0])?;
        }
        let shape = product_shape(&x.shape, &levels.shape)?;
        let quantized = ["levels", "scale", "zero"].map(|part| self.fresh(part));
        let [quantized_levels, scale, zero] = quantized.each_ref().map(String::as_str);
        self.push("DynamicQuantizeLinear", &[&x.name], &[quantized_levels, scale, zero], &[]);
        let sums = self.fresh("MatMulInteger");
        self.push("MatMulInteger", &[quantized_levels, &levels.name, zero], &[&sums], &[]);
        let sums = Value { name: sums, shape, dtype: Dtype::F32 };
        let sums = self.node("Cast", &[&sums], &[("to", Attribute::Int(DataType::Float as i64))], sums.shape.clone(), Dtype::F32);
        let scale = Value { name: scale.to_owned(), shape: Vec::new(), dtype: Dtype::F32 };
        let both = self.mul(&scales, &scale)?;
        self.mul(&sums, &both)
    }

    /// What a weight is multiplied with, as it enters a product whose weight has a scale for each index of `axis`.
    pub(super) fn entering(&mut self, x: &Value, weight: &str, axis: usize) -> Built {
        if self.element(weight)? != (Element::I8 { axis }) {
            return Ok(x.clone());
        }
        match self.products {
            Products::Expanded | Products::Dynamic => Ok(x.clone()),
            Products::Static(scales) => {
                let Some(&scale) = scales.get(weight) else {
                    return refuse("QuantizeLinear", format!("calibration gave no scale for what `{weight}` is multiplied with"));
                };
                let scale = self.constant(&[], &[scale]);
                let zero = Value { name: self.initializer(&[], DataType::Int8, vec![0]), shape: Vec::new(), dtype: Dtype::F32 };
                let levels = self.node("QuantizeLinear", &[x, &scale, &zero], &[], x.shape.clone(), Dtype::F32);
                Ok(self.node("DequantizeLinear", &[&levels, &scale, &zero], &[], x.shape.clone(), Dtype::F32))
            }
            Products::Observed => {
                let name = format!("{OBSERVED}{weight}");
                self.push("Identity", &[&x.name], &[&name], &[]);
                let size = |dim: &Dim| match (dim.fixed(), dim.symbol) {
                    (Some(number), _) => Ok(Size::Fixed(number)),
                    (None, Some(symbol)) if dim.number == 0 => Ok(Size::Symbol(symbol)),
                    _ => refuse("Identity", format!("{:?} cannot be an output", x.shape)),
                };
                let shape = x.shape.iter().map(size).collect::<Result<_, _>>()?;
                self.observed.push(TensorSignature { name, shape, dtype: Dtype::F32 });
                Ok(x.clone())
            }
        }
    }

    /// Rows of a weight `[n, width]` by indices `[k]`: `[k, width]`. In the dynamic form, whose runtime would expand the whole
    /// table when it is loaded, 8-bit rows are gathered as they are stored and scaled then.
    ///
    /// # Errors
    /// No such weight, or operands of other ranks or types.
    pub fn rows_of(&mut self, weight: &str, indices: &Value) -> Built {
        if self.element(weight)? != (Element::I8 { axis: 0 }) || !matches!(self.products, Products::Dynamic) {
            let table = self.weight(weight)?;
            return self.gather(&table, indices);
        }
        let (levels, _) = self.stored(weight)?;
        let (scales, _) = self.stored(&WeightStore::scales_of(weight))?;
        let rows = self.gather(&levels, indices)?;
        let rows = self.node("Cast", &[&rows], &[("to", Attribute::Int(DataType::Float as i64))], rows.shape.clone(), Dtype::F32);
        let count = indices.shape[0];
        let of_rows = self.node("Gather", &[&scales, indices], &[("axis", Attribute::Int(0))], vec![count], Dtype::F32);
        let of_rows = self.reshape(&of_rows, &[count, 1.into()])?;
        self.mul(&rows, &of_rows)
    }
}
