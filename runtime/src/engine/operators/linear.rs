//! Products with constant matrices: `activation(x · W + bias)`, `W` in 4, 8 or 32 bits.

use std::fmt;

use tract_onnx::pb::tensor_proto::DataType;

use super::{Attributes, Operator, View, floats};
use crate::kernels::{Activation, Layout, Matrix, Weights};

/// One input `[…, inputs]`, an output `[…, outputs]`.
pub(in crate::engine) const NAME: &str = "UnimoLinear";

/// Flag: weights of 8 and 4 bits are multiplied as such.
pub(super) const INTEGERS: &str = "integers";

pub(super) struct Linear {
    matrix: Matrix,
    activation: Activation,
}

impl Linear {
    /// Reads the attributes `weight` (`[inputs, outputs]`, or `[outputs, inputs]` with `transposed`; of 4 bits `[outputs, inputs / 2]`
    /// bytes), `scales` (of weights of 8 and 4 bits), [`INTEGERS`], `bias` and `gelu`.
    pub fn new(attributes: &Attributes<'_>) -> Result<Self, String> {
        let weight = attributes.tensor("weight").ok_or("a product without a weight")?;
        let &[rows, columns] = weight.dims.as_slice() else { return Err(format!("a weight of shape {:?}", weight.dims)) };
        let size = |size: i64| usize::try_from(size).map_err(|_| format!("a weight of shape {:?}", weight.dims));
        let (rows, columns) = (size(rows)?, size(columns)?);
        let four = weight.data_type == DataType::Uint8 as i32;
        let (transposed, integers) = (attributes.flag("transposed"), attributes.flag(INTEGERS));
        let shape = match (four, transposed) {
            (true, _) => [2 * columns, rows],
            (false, true) => [columns, rows],
            (false, false) => [rows, columns],
        };
        let scales = || attributes.floats("scales").ok_or("levels without scales");
        let (levels, scale, values);
        let weights = if four {
            scale = scales()?;
            let levels = weight.raw_data.as_slice();
            if integers { Weights::FourBitIntegers(levels, &scale) } else { Weights::I4(levels, &scale) }
        } else if weight.data_type == DataType::Int8 as i32 {
            levels = weight.raw_data.iter().map(|byte| byte.cast_signed()).collect::<Vec<i8>>();
            scale = scales()?;
            if integers { Weights::Integers(&levels, &scale) } else { Weights::I8(&levels, &scale) }
        } else {
            values = floats(weight);
            Weights::F32(&values)
        };
        let bias = attributes.floats("bias");
        let matrix = Matrix::new(weights, shape, transposed, bias.as_deref()).ok_or("weights of another size")?;
        Ok(Self { matrix, activation: if attributes.flag("gelu") { Activation::Gelu } else { Activation::None } })
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linear [{}, {}] {:?}", self.matrix.inputs(), self.matrix.outputs(), self.activation)
    }
}

impl Operator for Linear {
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>, String> {
        match inputs {
            [[rows @ .., width]] if *width == self.matrix.inputs() => Ok([rows, &[self.matrix.outputs()]].concat()),
            _ => Err(format!("{self:?} of {inputs:?}")),
        }
    }

    fn compute(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<(), String> {
        let [x] = inputs else { return Err(format!("{self:?} of {} inputs", inputs.len())) };
        let (inputs, outputs) = (self.matrix.inputs(), self.matrix.outputs());
        let (x, y) = ((x.values, Layout::dense(inputs)), (output, Layout::dense(outputs)));
        self.matrix.multiply_shared(x.0.len() / inputs, x, self.activation, y);
        Ok(())
    }
}
