//! A screen that is mounted on its side or upside down.

use super::{Canvas, Display, DisplayError, Geometry, check_size};

/// By how much the picture is turned, clockwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// 90°.
    Quarter,
    /// 180°.
    Half,
    /// 270°.
    ThreeQuarters,
}

/// Turns pictures before they are shown.
pub struct Rotated {
    display: Box<dyn Display>,
    rotation: Rotation,
    turned: Canvas,
}

impl Rotated {
    /// A screen whose pictures are turned.
    #[must_use]
    pub fn new(display: Box<dyn Display>, rotation: Rotation) -> Self {
        let Geometry { width, height, .. } = display.geometry();
        Self { display, rotation, turned: Canvas::new(width, height) }
    }
}

impl Display for Rotated {
    fn geometry(&self) -> Geometry {
        let geometry = self.display.geometry();
        match self.rotation {
            Rotation::Half => geometry,
            Rotation::Quarter | Rotation::ThreeQuarters => {
                Geometry { width: geometry.height, height: geometry.width, ..geometry }
            }
        }
    }

    fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
        check_size(canvas, self.geometry())?;
        let (width, height) = (self.turned.width() as usize, self.turned.height() as usize);
        for y in 0..height {
            for (x, colour) in self.turned.row_mut(y as u32).iter_mut().enumerate() {
                let (from_x, from_y) = match self.rotation {
                    Rotation::Quarter => (y, width - 1 - x),
                    Rotation::Half => (width - 1 - x, height - 1 - y),
                    Rotation::ThreeQuarters => (height - 1 - y, x),
                };
                *colour = canvas.row(from_y as u32)[from_x];
            }
        }
        self.display.present(&self.turned)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::Colours;
    use super::super::canvas::art;
    use super::*;

    struct Kept(Arc<Mutex<String>>);

    impl Display for Kept {
        fn geometry(&self) -> Geometry {
            Geometry { width: 4, height: 3, colours: Colours::Two }
        }

        fn present(&mut self, canvas: &Canvas) -> Result<(), DisplayError> {
            *self.0.lock().unwrap() = art(canvas);
            Ok(())
        }
    }

    #[test]
    fn pictures_are_turned_clockwise() {
        // An L, which no turn of it equals.
        let (tall, wide) = ("#..\n#..\n#..\n##.\n", "#...\n#...\n##..\n");
        let cases = [
            (Rotation::Quarter, tall, "####\n#...\n....\n"),
            (Rotation::ThreeQuarters, tall, "....\n...#\n####\n"),
            (Rotation::Half, wide, "..##\n...#\n...#\n"),
        ];
        for (rotation, drawing, expected) in cases {
            let shown = Arc::new(Mutex::new(String::new()));
            let mut display = Rotated::new(Box::new(Kept(shown.clone())), rotation);
            let Geometry { width, height, .. } = display.geometry();
            let mut canvas = Canvas::new(width, height);
            assert_eq!((width as usize, height as usize), (drawing.find('\n').unwrap(), drawing.lines().count()));
            for (y, row) in drawing.lines().enumerate() {
                for (x, _) in row.match_indices('#') {
                    canvas.row_mut(y as u32)[x] = [255; 3];
                }
            }
            display.present(&canvas).unwrap();
            assert_eq!(*shown.lock().unwrap(), expected, "{rotation:?}");
            let wrong = display.present(&Canvas::new(7, 7)).unwrap_err().to_string();
            assert!(wrong.contains("(7, 7)"), "{wrong}");
        }
    }
}
