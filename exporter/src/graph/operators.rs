//! The ONNX operators that the graphs are made of, with their shapes.

use unimo::bundle::manifest::Dtype;

use super::{Attribute, Dim, GraphBuilder, GraphError, Value, dims, shape};

pub(super) type Built = Result<Value, GraphError>;

pub(super) fn refuse<T>(operator: &'static str, reason: String) -> Result<T, GraphError> {
    Err(GraphError::Shape { operator, reason })
}

/// NumPy broadcasting of two shapes.
fn broadcast(operator: &'static str, a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, GraphError> {
    let rank = a.len().max(b.len());
    let at = |shape: &[Dim], i: usize| if i + shape.len() < rank { Dim::from(1) } else { shape[i + shape.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (x, y) if x == 1 => Ok(y),
            _ => refuse(operator, format!("{a:?} against {b:?}")),
        })
        .collect()
}

/// Shape of a matrix product of the last two dimensions.
pub(super) fn product_shape(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, GraphError> {
    let (ra, rb) = (a.len(), b.len());
    if ra < 2 || rb < 2 || a[ra - 1] != b[rb - 2] {
        return refuse("MatMul", format!("{a:?} · {b:?}"));
    }
    let mut shape = broadcast("MatMul", &a[..ra - 2], &b[..rb - 2])?;
    shape.extend([a[ra - 2], b[rb - 1]]);
    Ok(shape)
}

/// Geometry of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Convolution {
    /// Step in both directions.
    pub stride: usize,
    /// Padding: top, left, bottom, right.
    pub pads: [usize; 4],
    /// Groups; as many as channels for a depthwise convolution.
    pub groups: usize,
}

impl GraphBuilder<'_> {
    fn binary(&mut self, operator: &'static str, a: &Value, b: &Value) -> Built {
        if a.dtype != Dtype::F32 || b.dtype != Dtype::F32 {
            return refuse(operator, "both operands must be f32".into());
        }
        let shape = broadcast(operator, &a.shape, &b.shape)?;
        Ok(self.node(operator, &[a, b], &[], shape, Dtype::F32))
    }

    fn unary(&mut self, operator: &'static str, x: &Value) -> Value {
        self.node(operator, &[x], &[], x.shape.clone(), x.dtype)
    }

    /// Sum, with broadcasting.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn add(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Add", a, b)
    }

    /// Product by element, with broadcasting.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn mul(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Mul", a, b)
    }

    /// Quotient by element, with broadcasting.
    ///
    /// # Errors
    /// Shapes that do not broadcast.
    pub fn div(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Div", a, b)
    }

    /// Product with a number.
    ///
    /// # Errors
    /// None for an f32 value.
    pub fn scale(&mut self, x: &Value, factor: f32) -> Built {
        let factor = self.constant(&[1], &[factor]);
        self.mul(x, &factor)
    }

    /// Matrix product of the last two dimensions; leading ones broadcast.
    ///
    /// # Errors
    /// Inner dimensions that differ.
    pub fn matmul(&mut self, a: &Value, b: &Value) -> Built {
        let shape = product_shape(&a.shape, &b.shape)?;
        Ok(self.node("MatMul", &[a, b], &[], shape, Dtype::F32))
    }

    /// `x · weight + bias` with the weights `<name>.weight` `[in, out]` and `<name>.bias` `[out]`.
    ///
    /// # Errors
    /// Missing weights or shapes that do not fit.
    pub fn linear(&mut self, name: &str, x: &Value) -> Built {
        let weight = format!("{name}.weight");
        self.element(&weight)?;
        let bias = self.weight(&format!("{name}.bias"))?;
        let product = self.product(x, &weight, false)?;
        self.add(&product, &bias)
    }

    /// LayerNorm over the last dimension with `<name>.weight` and `<name>.bias`.
    ///
    /// # Errors
    /// Missing weights or another width.
    pub fn layer_norm(&mut self, name: &str, x: &Value, eps: f32) -> Built {
        let weight = self.weight(&format!("{name}.weight"))?;
        let bias = self.weight(&format!("{name}.bias"))?;
        let width = x.shape.last().copied().unwrap_or(Dim::from(0));
        if weight.shape != [width] || bias.shape != [width] {
            return refuse("LayerNormalization", format!("{:?} with weights {:?}", x.shape, weight.shape));
        }
        let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(eps))];
        Ok(self.node("LayerNormalization", &[x, &weight, &bias], &attributes, x.shape.clone(), Dtype::F32))
    }

    /// Softmax over the last dimension.
    pub fn softmax(&mut self, x: &Value) -> Value {
        self.node("Softmax", &[x], &[("axis", Attribute::Int(-1))], x.shape.clone(), Dtype::F32)
    }

    /// `max(x, 0)`.
    pub fn relu(&mut self, x: &Value) -> Value {
        self.unary("Relu", x)
    }

    /// `min(max(x, 0), 6)`.
    pub fn relu6(&mut self, x: &Value) -> Value {
        let (low, high) = (self.constant(&[], &[0.0]), self.constant(&[], &[6.0]));
        self.node("Clip", &[x, &low, &high], &[], x.shape.clone(), Dtype::F32)
    }

    /// GELU with the error function, `x · ½ · (1 + erf(x/√2))`.
    ///
    /// # Errors
    /// None for an f32 value.
    pub fn gelu(&mut self, x: &Value) -> Built {
        let scaled = self.scale(x, std::f32::consts::FRAC_1_SQRT_2)?;
        let erf = self.unary("Erf", &scaled);
        let one = self.constant(&[1], &[1.0]);
        let sum = self.add(&erf, &one)?;
        let product = self.mul(x, &sum)?;
        self.scale(&product, 0.5)
    }

    /// Divides rows by their Euclidean length.
    ///
    /// # Errors
    /// None for an f32 value.
    pub fn unit_length(&mut self, x: &Value) -> Built {
        let square = self.mul(x, x)?;
        let sum = self.sum_of_rows(&square);
        let floor = self.constant(&[1], &[1e-12]);
        let sum = self.add(&sum, &floor)?;
        let length = self.unary("Sqrt", &sum);
        self.div(x, &length)
    }

    /// Sum over the last dimension, which stays with length 1.
    pub fn sum_of_rows(&mut self, x: &Value) -> Value {
        let axes = self.integers(&[-1]);
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = Dim::from(1);
        }
        self.node("ReduceSum", &[x, &axes], &[("keepdims", Attribute::Int(1))], shape, Dtype::F32)
    }

    /// Mean over one axis, which stays with length 1.
    ///
    /// # Errors
    /// No such axis.
    pub fn mean(&mut self, x: &Value, axis: usize) -> Built {
        let mut shape = x.shape.clone();
        match shape.get_mut(axis) {
            Some(d) => *d = Dim::from(1),
            None => return refuse("ReduceMean", format!("axis {axis} of {:?}", x.shape)),
        }
        let attributes = [("axes", Attribute::Ints(vec![axis as i64])), ("keepdims", Attribute::Int(1))];
        Ok(self.node("ReduceMean", &[x], &attributes, shape, Dtype::F32))
    }

    /// Same elements in another shape.
    ///
    /// # Errors
    /// Another number of elements, or more than one size with a symbol.
    pub fn reshape(&mut self, x: &Value, shape: &[Dim]) -> Built {
        let symbols = |shape: &[Dim]| -> Vec<Dim> { shape.iter().copied().filter(|d| d.symbol.is_some()).collect() };
        let numbers = |shape: &[Dim]| shape.iter().filter_map(|d| d.fixed()).product::<usize>();
        let (symbol, number) = (symbols(&x.shape), numbers(&x.shape));
        if number != numbers(shape) || symbol != symbols(shape) || symbol.len() > 1 {
            return refuse("Reshape", format!("{:?} to {shape:?}", x.shape));
        }
        // -1 stands for the size that remains.
        let target: Vec<i64> = shape.iter().map(|d| d.fixed().map_or(-1, |number| number as i64)).collect();
        let target = self.integers(&target);
        Ok(self.node("Reshape", &[x, &target], &[], shape.to_vec(), x.dtype))
    }

    /// Reorders the dimensions.
    ///
    /// # Errors
    /// Not a permutation.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Built {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..x.shape.len()) {
            return refuse("Transpose", format!("{order:?} of {:?}", x.shape));
        }
        let shape = order.iter().map(|&i| x.shape[i]).collect();
        Ok(self.node("Transpose", &[x], &[("perm", Attribute::Ints(dims(order)))], shape, x.dtype))
    }

    /// `x[start..end]` along one axis.
    ///
    /// # Errors
    /// A range outside the axis, or outside the number of a size with a symbol.
    pub fn slice(&mut self, x: &Value, axis: usize, start: usize, end: usize) -> Built {
        let mut shape = x.shape.clone();
        match shape.get_mut(axis) {
            Some(d) if start < end && end <= d.number => *d = Dim::from(end - start),
            _ => return refuse("Slice", format!("{start}..{end} of axis {axis} of {:?}", x.shape)),
        }
        Ok(self.sliced(x, axis, [start as i64, end as i64], shape))
    }

    /// `x[start..]` along one axis.
    ///
    /// # Errors
    /// A start outside the axis, or outside the number of a size with a symbol.
    pub fn rest(&mut self, x: &Value, axis: usize, start: usize) -> Built {
        let mut shape = x.shape.clone();
        match shape.get_mut(axis) {
            Some(d) if start < d.number || start == d.number && d.symbol.is_some() => d.number -= start,
            _ => return refuse("Slice", format!("{start}.. of axis {axis} of {:?}", x.shape)),
        }
        Ok(self.sliced(x, axis, [start as i64, i64::MAX], shape))
    }

    fn sliced(&mut self, x: &Value, axis: usize, [start, end]: [i64; 2], shape: Vec<Dim>) -> Value {
        let [start, end, axis] = [start, end, axis as i64].map(|v| self.integers(&[v]));
        self.node("Slice", &[x, &start, &end, &axis], &[], shape, x.dtype)
    }

    /// Joins values along one axis.
    ///
    /// # Errors
    /// Other dimensions that differ.
    pub fn concat(&mut self, parts: &[&Value], axis: usize) -> Built {
        let Some(first) = parts.first() else { return refuse("Concat", "nothing to join".into()) };
        let mut shape = first.shape.clone();
        if axis >= shape.len() {
            return refuse("Concat", format!("axis {axis} of {shape:?}"));
        }
        for part in &parts[1..] {
            let fits = part.shape.len() == shape.len() && (0..shape.len()).all(|i| i == axis || part.shape[i] == first.shape[i]);
            if !fits {
                return refuse("Concat", format!("{:?} beside {:?} along {axis}", part.shape, first.shape));
            }
            let (sum, part) = (&mut shape[axis], part.shape[axis]);
            if sum.symbol.is_some() && part.symbol.is_some() {
                return refuse("Concat", format!("{sum:?} and {part:?} along {axis}"));
            }
            *sum = Dim { number: sum.number + part.number, symbol: sum.symbol.or(part.symbol) };
        }
        Ok(self.node("Concat", parts, &[("axis", Attribute::Int(axis as i64))], shape, first.dtype))
    }

    /// Rows of a table `[n, width]` by indices `[k]`: `[k, width]`.
    ///
    /// # Errors
    /// Operands of other ranks or types.
    pub fn gather(&mut self, table: &Value, indices: &Value) -> Built {
        if table.shape.len() != 2 || indices.shape.len() != 1 || indices.dtype != Dtype::I64 {
            return refuse("Gather", format!("{:?} by {:?} {:?}", table.shape, indices.dtype, indices.shape));
        }
        let shape = vec![indices.shape[0], table.shape[1]];
        Ok(self.node("Gather", &[table, indices], &[("axis", Attribute::Int(0))], shape, table.dtype))
    }

    /// Means of the tiles of `side` by `side` values of `[1, channels, height, width]`.
    ///
    /// # Errors
    /// Sides that are no multiples of the tile's.
    pub fn average_pool(&mut self, x: &Value, side: usize) -> Built {
        let sizes: Option<Vec<usize>> = x.shape.iter().map(|d| d.fixed()).collect();
        let Some(&[1, channels, height, width]) = sizes.as_deref() else {
            return refuse("AveragePool", format!("{:?}", x.shape));
        };
        if side == 0 || !height.is_multiple_of(side) || !width.is_multiple_of(side) {
            return refuse("AveragePool", format!("{:?} in tiles of {side}", x.shape));
        }
        let tile = || Attribute::Ints(vec![side as i64; 2]);
        let shape = shape(&[1, channels, height / side, width / side]);
        Ok(self.node("AveragePool", &[x], &[("kernel_shape", tile()), ("strides", tile())], shape, Dtype::F32))
    }

    /// Two-dimensional convolution of `[1, channels, height, width]` with `<name>.weight` and `<name>.bias`.
    ///
    /// # Errors
    /// Missing weights or channels that do not fit.
    pub fn convolution(&mut self, name: &str, x: &Value, geometry: Convolution) -> Built {
        let x = &self.entering(x, &format!("{name}.weight"), 0)?;
        let weight = self.weight(&format!("{name}.weight"))?;
        let bias = self.weight(&format!("{name}.bias"))?;
        let Convolution { stride, pads, groups } = geometry;
        let fixed = |value: &Value| value.shape.iter().map(|d| d.fixed()).collect::<Option<Vec<usize>>>();
        let (Some(&[1, channels, height, width]), Some(&[outputs, inputs, kernel_height, kernel_width])) =
            (fixed(x).as_deref(), fixed(&weight).as_deref())
        else {
            return refuse("Conv", format!("{name}: {:?} with {:?}", x.shape, weight.shape));
        };
        if inputs * groups != channels || bias.shape != [Dim::from(outputs)] {
            return refuse("Conv", format!("{name}: {:?} with {:?} in {groups} groups", x.shape, weight.shape));
        }
        let kernel = [kernel_height, kernel_width];
        let side = |size: usize, i: usize| (size + pads[i] + pads[i + 2] - kernel[i]) / stride + 1;
        let shape = shape(&[1, outputs, side(height, 0), side(width, 1)]);
        let attributes = [
            ("kernel_shape", Attribute::Ints(dims(&kernel))),
            ("strides", Attribute::Ints(vec![stride as i64; 2])),
            ("pads", Attribute::Ints(dims(&pads))),
            ("group", Attribute::Int(groups as i64)),
        ];
        Ok(self.node("Conv", &[x, &weight, &bias], &attributes, shape, Dtype::F32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Products, Storage, WeightStore};
    use unimo::bundle::manifest::{GraphSignature, Precision, Size, Symbol, TensorSignature};

    #[test]
    fn operands_that_do_not_fit_are_refused_by_name() {
        let tensor = |name: &str, shape: &[usize], dtype| TensorSignature {
            name: name.into(),
            shape: shape.iter().copied().map(Size::Fixed).collect(),
            dtype,
        };
        let signature = GraphSignature {
            name: "test".into(),
            inputs: vec![tensor("x", &[2, 3], Dtype::F32), tensor("i", &[4], Dtype::I64)],
            outputs: vec![tensor("y", &[2, 2], Dtype::F32)],
        };
        let mut weights = WeightStore::new(Storage::of(Precision::F32));
        weights.add("fc.weight", &[4, 2], 1, &[0.0; 8]).unwrap();
        weights.add("fc.bias", &[2], 0, &[0.0; 2]).unwrap();
        let mut b = GraphBuilder::new(&signature, &weights, Products::Expanded);
        let (x, i) = (b.input("x").unwrap(), b.input("i").unwrap());
        let says = |result: Built| result.unwrap_err().to_string();
        assert_eq!(says(b.linear("fc", &x)), "MatMul: [2, 3] · [4, 2]");
        assert_eq!(says(b.linear("nothing", &x)), "there is no weight `nothing.weight`");
        assert_eq!(says(b.add(&x, &i)), "Add: both operands must be f32");
        assert_eq!(says(b.reshape(&x, &shape(&[4]))), "Reshape: [2, 3] to [4]");
        assert_eq!(says(b.transpose(&x, &[0, 0])), "Transpose: [0, 0] of [2, 3]");
        assert_eq!(says(b.slice(&x, 1, 2, 4)), "Slice: 2..4 of axis 1 of [2, 3]");
        assert_eq!(says(b.concat(&[&x, &i], 0)), "Concat: [4] beside [2, 3] along 0");
        assert_eq!(says(b.average_pool(&x, 2)), "AveragePool: [2, 3]");
        assert_eq!(says(b.gather(&x, &x)), "Gather: [2, 3] by F32 [2, 3]");
        assert!(says(b.input("z")).contains("`z` is not an input"));
        let error = b.finish(&[x]).unwrap_err().to_string();
        assert_eq!(error, "output `y` is F32 [2, 3], the contract says F32 [2, 2]");
    }

    #[test]
    fn symbols_are_sizes_of_their_own() {
        let (fixed, slots) = (Size::Fixed, Size::Symbol(Symbol::Slots));
        let tensor = |name: &str, shape: &[Size]| TensorSignature { name: name.into(), shape: shape.to_vec(), dtype: Dtype::F32 };
        let signature = GraphSignature {
            name: "test".into(),
            inputs: vec![tensor("x", &[fixed(2), slots]), tensor("y", &[fixed(2), fixed(5)])],
            outputs: vec![tensor("z", &[fixed(2), fixed(1), slots])],
        };
        let weights = WeightStore::new(Storage::of(Precision::F32));
        let mut b = GraphBuilder::new(&signature, &weights, Products::Expanded);
        let (x, y) = (b.input("x").unwrap(), b.input("y").unwrap());
        let joined = b.concat(&[&y, &x], 1).unwrap();
        assert_eq!(format!("{:?}", joined.shape), "[2, 5+slots]");
        assert_eq!(b.slice(&joined, 1, 2, 5).unwrap().shape, shape(&[2, 3]));
        assert_eq!(b.rest(&joined, 1, 5).unwrap().shape, x.shape);
        let says = |result: Built| result.unwrap_err().to_string();
        assert_eq!(says(b.slice(&joined, 1, 2, 6)), "Slice: 2..6 of axis 1 of [2, 5+slots]");
        assert_eq!(says(b.rest(&joined, 1, 6)), "Slice: 6.. of axis 1 of [2, 5+slots]");
        assert_eq!(says(b.rest(&y, 1, 5)), "Slice: 5.. of axis 1 of [2, 5]");
        assert_eq!(says(b.concat(&[&x, &x], 1)), "Concat: slots and slots along 1");
        assert_eq!(says(b.add(&x, &y)), "Add: [2, slots] against [2, 5]");
        assert_eq!(b.reshape(&x, &[x.shape[1], 1.into(), 2.into()]).unwrap().shape[0], x.shape[1]);
        assert_eq!(says(b.reshape(&x, &shape(&[2, 5]))), "Reshape: [2, slots] to [2, 5]");
        let error = b.finish(&[x]).unwrap_err().to_string();
        assert_eq!(error, "output `z` is F32 [2, slots], the contract says F32 [2, 1, slots]");
    }

    #[test]
    fn shapes_broadcast_as_in_numpy() {
        for (a, b, expected) in [
            (&[4, 1][..], &[3][..], Some(vec![4, 3])),
            (&[2, 3, 4], &[3, 1], Some(vec![2, 3, 4])),
            (&[], &[5], Some(vec![5])),
            (&[2], &[3], None),
        ] {
            assert_eq!(broadcast("Add", &shape(a), &shape(b)).ok(), expected.map(|sizes: Vec<usize>| shape(&sizes)));
        }
    }
}
