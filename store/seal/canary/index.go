package canary

import "bytes"

// index finds any of many needles in one pass, by the algorithm of Wu and Manber: of
// the window that is as long as the shortest needle it looks at the last block, which
// tells how far the next place is where a needle can be. Most of a file is skipped;
// to look for one needle after the other took ten times as long.
type index struct {
	window  int
	shift   [1 << 16]uint8
	needles map[uint16][]needle // by the last block of the window that they begin with
}

const block = 3

func blockOf(b []byte) uint16 { return uint16(b[0])<<10 ^ uint16(b[1])<<5 ^ uint16(b[2]) }

func newIndex(needles []needle) *index {
	x := &index{window: len(needles[0].bytes), needles: map[uint16][]needle{}}
	for _, n := range needles {
		x.window = min(x.window, len(n.bytes))
	}
	for i := range x.shift {
		x.shift[i] = uint8(x.window - block + 1)
	}
	for _, n := range needles {
		for end := block; end <= x.window; end++ {
			b := blockOf(n.bytes[end-block:])
			x.shift[b] = min(x.shift[b], uint8(x.window-end))
			if end == x.window {
				x.needles[b] = append(x.needles[b], n)
			}
		}
	}
	return x
}

// find calls hit with each needle that begins in the first bytes of data, and with
// data from there on.
func (x *index) find(data []byte, first int, hit func(n needle, rest []byte)) {
	for at := 0; at < first && at+x.window <= len(data); {
		b := blockOf(data[at+x.window-block:])
		if skip := x.shift[b]; skip > 0 {
			at += int(skip)
			continue
		}
		for _, n := range x.needles[b] {
			if bytes.HasPrefix(data[at:], n.bytes) {
				hit(n, data[at:])
			}
		}
		at++
	}
}
