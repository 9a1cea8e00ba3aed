//! A network of inverted residuals (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381),
//! channels innermost, a few rows at a time, so that the wide inner activations never leave the cache.

use rayon::prelude::*;

use super::matrix::threads;
use super::{Activation, Depthwise, Layout, Matrix};

/// Floats of a strip's expanded rows: they stay in a second-level cache of 512 KiB beside the weights that they meet.
const STRIP: usize = 64 * 1024;

/// Height and width in pixels.
type Size = [usize; 2];

/// The first convolution: 3×3, stride 2, one pixel of padding at bottom and right, ReLU6.
#[derive(Debug)]
pub(crate) struct Stem {
    channels: usize,
    kernel: Matrix,
}

impl Stem {
    /// Of a kernel `[9 · channels, outputs]`, each column an output's weights in the order channel, row, column.
    pub fn new(channels: usize, kernel: Matrix) -> Option<Self> {
        (kernel.inputs() == 9 * channels).then_some(Self { channels, kernel })
    }

    /// Pixels `[channels, height, width]`, both even, to `[height / 2, width / 2, outputs]`.
    fn run(&self, pixels: &[f32], [height, width]: Size, scratch: &mut Vec<f32>, y: &mut Vec<f32>) {
        let (rows, columns, taps) = (height / 2, width / 2, self.kernel.inputs());
        y.resize(rows * columns * self.kernel.outputs(), 0.0);
        scratch.clear();
        scratch.resize(columns * taps, 0.0);
        for (row, y) in y.chunks_exact_mut(columns * self.kernel.outputs()).enumerate() {
            for (tap, (channel, dy)) in (0..self.channels).flat_map(|c| (0..3).map(move |dy| (c, dy))).enumerate() {
                let line = 2 * row + dy;
                let from = (line < height).then(|| &pixels[(channel * height + line) * width..][..width]);
                for (column, patch) in scratch.chunks_exact_mut(taps).enumerate() {
                    for (dx, to) in patch[3 * tap..3 * tap + 3].iter_mut().enumerate() {
                        *to = from.and_then(|line| line.get(2 * column + dx)).copied().unwrap_or_default();
                    }
                }
            }
            let (from, to) = (Layout::dense(taps), Layout::dense(self.kernel.outputs()));
            self.kernel.multiply(columns, (scratch, from), None, Activation::Relu6, (y, to));
        }
    }
}

/// Pointwise expansion with ReLU6 (or none), depthwise 3×3 with ReLU6, pointwise projection, and the input added where asked for.
#[derive(Debug)]
pub(crate) struct Bottleneck {
    expand: Option<Matrix>,
    depthwise: Depthwise,
    stride: usize,
    project: Matrix,
    residual: bool,
}

impl Bottleneck {
    /// Puts a block together; `None` where channels do not fit, or the stride is neither 1 (padding of one pixel all round) nor 2
    /// (one at bottom and right).
    pub fn new(expand: Option<Matrix>, depthwise: Depthwise, stride: usize, project: Matrix, residual: bool) -> Option<Self> {
        let inner = depthwise.channels();
        let fits = expand.as_ref().is_none_or(|expand| expand.outputs() == inner) && project.inputs() == inner;
        let block = Self { expand, depthwise, stride, project, residual };
        let closes = !residual || (stride == 1 && block.inputs() == block.outputs());
        (fits && closes && (1..=2).contains(&stride)).then_some(block)
    }

    /// Channels that it reads.
    pub fn inputs(&self) -> usize {
        self.expand.as_ref().map_or(self.depthwise.channels(), Matrix::inputs)
    }

    /// Channels that it gives.
    pub fn outputs(&self) -> usize {
        self.project.outputs()
    }

    /// `[height, width, inputs]` to `[height / stride, width / stride, outputs]`.
    fn run(&self, x: &[f32], size: Size, scratch: &mut [Vec<f32>; 2], y: &mut Vec<f32>) {
        let [rows, columns] = size.map(|side| side / self.stride);
        let line = self.line(size[1]);
        let strip = ((STRIP / line).saturating_sub(3) / self.stride + 1).min(rows);
        y.resize(rows * columns * self.outputs(), 0.0);
        let threads = threads();
        if threads > 1 {
            // Strips by themselves: rows that two of them need are expanded twice.
            let strip = strip.min(rows.div_ceil(threads));
            let strips = y.par_chunks_mut(strip * columns * self.outputs()).enumerate();
            strips.for_each_init(Default::default, |scratch: &mut [Vec<f32>; 2], (number, y)| {
                self.fit(scratch, strip, columns, line);
                self.strip(x, size, number * strip, 0, scratch, y);
            });
            return;
        }
        self.fit(scratch, strip, columns, line);
        let overlap = 3 - self.stride;
        for (number, y) in y.chunks_mut(strip * columns * self.outputs()).enumerate() {
            let kept = if number == 0 { 0 } else { overlap };
            let last = ((strip - 1) * self.stride + 3) * line;
            scratch[0].copy_within(last - kept * line..last, 0);
            self.strip(x, size, number * strip, kept, scratch, y);
        }
    }

    /// Floats of a row of the strip, padding included.
    fn line(&self, width: usize) -> usize {
        (width + self.before() + 1) * self.depthwise.channels()
    }

    /// Pixels of padding at the top and the left.
    fn before(&self) -> usize {
        if self.stride == 1 { 1 } else { 0 }
    }

    /// Makes room for the strip's lines, with zeros left and right of where their pixels will be.
    fn fit(&self, [wide, filtered]: &mut [Vec<f32>; 2], strip: usize, columns: usize, line: usize) {
        let inner = self.depthwise.channels();
        wide.resize(((strip - 1) * self.stride + 3) * line, 0.0);
        for line in wide.chunks_exact_mut(line) {
            let right = line.len() - inner;
            line[..self.before() * inner].fill(0.0);
            line[right..].fill(0.0);
        }
        filtered.resize(strip * columns * inner, 0.0);
    }

    /// The rows of `y`, which begin with row `first`; of the expanded rows that they need, the first `kept` are there already.
    fn strip(
        &self,
        x: &[f32],
        [height, width]: Size,
        first: usize,
        kept: usize,
        [wide, filtered]: &mut [Vec<f32>; 2],
        y: &mut [f32],
    ) {
        let (stride, inner, before, line) = (self.stride, self.depthwise.channels(), self.before(), self.line(width));
        let columns = width / stride;
        let count = y.len() / (columns * self.outputs());
        let needed = (count - 1) * stride + 3;
        // Row i of the strip is row `first · stride + i − before` of the image; those outside of it are padding.
        let begin = (first * stride + kept).max(before) - before;
        let skipped = begin + before - first * stride;
        let end = (first * stride + needed - before).min(height);
        wide[kept * line..skipped * line].fill(0.0);
        wide[(skipped + end - begin) * line..needed * line].fill(0.0);
        let rows = &x[begin * width * self.inputs()..end * width * self.inputs()];
        self.widen(rows, width, &mut wide[skipped * line + before * inner..], line);
        let filtered = &mut filtered[..count * columns * inner];
        self.depthwise.relu6(wide, line / inner, stride, [count, columns], filtered);
        let to = Layout::dense(self.outputs());
        let add = self.residual.then(|| (&x[first * columns * self.outputs()..][..y.len()], to));
        self.project.multiply(count * columns, (filtered, Layout::dense(inner)), add, Activation::None, (y, to));
    }

    /// Whole rows of the input, expanded, into lines of the strip.
    fn widen(&self, x: &[f32], width: usize, to: &mut [f32], line: usize) {
        let inner = self.depthwise.channels();
        match &self.expand {
            Some(expand) => {
                let rows = x.len() / expand.inputs();
                let layout = Layout { start: 0, width, line, step: inner };
                expand.multiply(rows, (x, Layout::dense(expand.inputs())), None, Activation::Relu6, (to, layout));
            }
            None => {
                for (x, to) in x.chunks_exact(width * inner).zip(to.chunks_mut(line)) {
                    to[..width * inner].copy_from_slice(x);
                }
            }
        }
    }
}

/// Stem, blocks, and a last pointwise convolution with ReLU6.
#[derive(Debug)]
pub(crate) struct Network {
    size: Size,
    stem: Stem,
    blocks: Vec<Bottleneck>,
    head: Matrix,
}

/// Memory of a run, to be used again.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    ends: [Vec<f32>; 2],
    inner: [Vec<f32>; 2],
}

impl Network {
    /// Puts a network together that reads pictures of a size; `None` where channels do not fit, or a size cannot be halved.
    pub fn new(size: Size, stem: Stem, blocks: Vec<Bottleneck>, head: Matrix) -> Option<Self> {
        let mut channels = stem.kernel.outputs();
        let mut halvings = 2;
        for block in &blocks {
            if block.inputs() != channels {
                return None;
            }
            channels = block.outputs();
            halvings *= block.stride;
        }
        let fits = head.inputs() == channels && size.iter().all(|&side| side > 0 && side.is_multiple_of(halvings));
        fits.then_some(Self { size, stem, blocks, head })
    }

    /// Shape of what it gives, `[channels, height, width]`.
    pub fn output(&self) -> [usize; 3] {
        let halvings: usize = self.blocks.iter().map(|block| block.stride).product();
        let [height, width] = self.size.map(|side| side / 2 / halvings);
        [self.head.outputs(), height, width]
    }

    /// Pixels `[channels, height, width]` to [`Self::output`].
    ///
    /// # Panics
    /// Where there are fewer pixels.
    pub fn run(&self, pixels: &[f32], scratch: &mut Scratch) -> Vec<f32> {
        let Scratch { ends: [x, y], inner } = scratch;
        self.stem.run(pixels, self.size, &mut inner[0], x);
        let mut size = self.size.map(|side| side / 2);
        for block in &self.blocks {
            block.run(x, size, inner, y);
            size = size.map(|side| side / block.stride);
            std::mem::swap(x, y);
        }
        let (cells, channels) = (size[0] * size[1], self.head.outputs());
        y.resize(cells * channels, 0.0);
        let (from, to) = (Layout::dense(self.head.inputs()), Layout::dense(channels));
        self.head.multiply_shared(cells, (x, from), Activation::Relu6, (y, to));
        let mut turned = vec![0.0; cells * channels];
        for (cell, row) in y[..cells * channels].chunks_exact(channels).enumerate() {
            for (channel, value) in row.iter().enumerate() {
                turned[channel * cells + cell] = *value;
            }
        }
        turned
    }
}

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| ((i as f32 + seed) * 0.731).sin()).collect()
    }

    /// A convolution of `[channels, height, width]`, as ONNX defines it, in 64 bits.
    fn convolution(x: &[f64], size: Size, w: &[f32], bias: &[f32], kernel: usize, stride: usize, groups: usize) -> Vec<f64> {
        let ([height, width], outputs) = (size, bias.len());
        let inputs = x.len() / height / width / groups;
        let before = if kernel == 3 && stride == 1 { 1 } else { 0 };
        let mut y = Vec::new();
        for o in 0..outputs {
            for row in 0..height / stride {
                for column in 0..width / stride {
                    let mut sum = f64::from(bias[o]);
                    for i in 0..inputs {
                        let channel = o * groups / outputs * inputs + i;
                        for (dy, dx) in (0..kernel).flat_map(|dy| (0..kernel).map(move |dx| (dy, dx))) {
                            let (r, c) = ((row * stride + dy).wrapping_sub(before), (column * stride + dx).wrapping_sub(before));
                            if r < height && c < width {
                                let weight = w[((o * inputs + i) * kernel + dy) * kernel + dx];
                                sum += f64::from(weight) * x[(channel * height + r) * width + c];
                            }
                        }
                    }
                    y.push(sum);
                }
            }
        }
        y
    }

    fn relu6(x: Vec<f64>) -> Vec<f64> {
        x.into_iter().map(|v| v.clamp(0.0, 6.0)).collect()
    }

    #[test]
    fn a_network_is_its_convolutions() {
        // Wide enough that blocks take several strips.
        let mut size = [32, 160];
        let pixels = numbers(3 * size[0] * size[1], 1.0);
        let dense = |inputs: usize, outputs: usize, seed: f32| {
            let (w, bias) = (numbers(inputs * outputs, seed), numbers(outputs, seed + 0.5));
            (w.iter().map(|v| v / (inputs as f32).sqrt()).collect::<Vec<_>>(), bias)
        };
        let matrix =
            |(w, b): &(Vec<f32>, Vec<f32>)| Matrix::new(Weights::F32(w), [w.len() / b.len(), b.len()], true, Some(b)).unwrap();
        let stem = dense(27, 32, 2.0);
        let mut x =
            relu6(convolution(&pixels.iter().map(|&p| f64::from(p)).collect::<Vec<_>>(), size, &stem.0, &stem.1, 3, 2, 1));
        size = size.map(|s| s / 2);
        let mut blocks = Vec::new();
        // Channels in, expansion, out, stride.
        for (i, (inputs, expansion, outputs, stride)) in
            [(32, 1, 16, 1), (16, 6, 24, 2), (24, 6, 24, 1), (24, 6, 40, 2)].into_iter().enumerate()
        {
            let (inner, seed) = (inputs * expansion, 10.0 * i as f32);
            let (expand, project) = (dense(inputs, inner, seed), dense(inner, outputs, seed + 3.0));
            let taps = (numbers(9 * inner, seed + 6.0), numbers(inner, seed + 7.0));
            let mut y = x.clone();
            if expansion > 1 {
                y = relu6(convolution(&y, size, &expand.0, &expand.1, 1, 1, 1));
            }
            y = relu6(convolution(&y, size, &taps.0, &taps.1, 3, stride, inner));
            size = size.map(|s| s / stride);
            y = convolution(&y, size, &project.0, &project.1, 1, 1, 1);
            let residual = stride == 1 && inputs == outputs;
            if residual {
                y.iter_mut().zip(&x).for_each(|(y, x)| *y += x);
            }
            x = y;
            let expand = (expansion > 1).then(|| matrix(&expand));
            let depthwise = Depthwise::new(&taps.0, &taps.1).unwrap();
            blocks.push(Bottleneck::new(expand, depthwise, stride, matrix(&project), residual).unwrap());
        }
        let head = dense(40, 48, 90.0);
        let expected = relu6(convolution(&x, size, &head.0, &head.1, 1, 1, 1));
        let network = Network::new([32, 160], Stem::new(3, matrix(&stem)).unwrap(), blocks, matrix(&head)).unwrap();
        assert_eq!(network.output(), [48, 4, 20]);
        let mut scratch = Scratch::default();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for shared in [false, true, false] {
            let found =
                if shared { pool.install(|| network.run(&pixels, &mut scratch)) } else { network.run(&pixels, &mut scratch) };
            assert_eq!(found.len(), expected.len());
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                // Ten layers of sums of up to 144 products, in f32.
                assert!((f64::from(*f) - e).abs() < 1e-4, "{i}: {f} {e}");
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let matrix = |inputs: usize, outputs: usize| {
            Matrix::new(Weights::F32(&vec![0.0; inputs * outputs]), [inputs, outputs], false, None).unwrap()
        };
        let depthwise = |channels: usize| Depthwise::new(&vec![0.0; 9 * channels], &vec![0.0; channels]).unwrap();
        assert!(Stem::new(3, matrix(26, 16)).is_none());
        assert!(Depthwise::new(&[0.0; 9 * 24], &[0.0; 24]).is_none());
        assert!(Bottleneck::new(None, depthwise(32), 1, matrix(16, 16), false).is_none());
        assert!(Bottleneck::new(None, depthwise(32), 1, matrix(32, 16), true).is_none());
        assert!(Bottleneck::new(None, depthwise(32), 3, matrix(32, 16), false).is_none());
        let block = || Bottleneck::new(None, depthwise(32), 2, matrix(32, 16), false).unwrap();
        let stem = || Stem::new(3, matrix(27, 32)).unwrap();
        assert!(Network::new([16, 16], stem(), vec![block()], matrix(32, 8)).is_none());
        assert!(Network::new([16, 18], stem(), vec![block()], matrix(16, 8)).is_none());
        assert!(Network::new([16, 16], stem(), vec![block()], matrix(16, 8)).is_some());
    }
}
