package handshake

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"
)

// frame is a result's, with a length that may lie.
func frame(magic string, length uint16, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte(magic), length), payload...)
}

// known fails unless the error is one that the readers promise for these bytes.
func known(t *testing.T, data []byte, err error) {
	t.Helper()
	if errors.Is(err, io.EOF) != (len(data) == 0) || !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFormat) {
		t.Fatalf("%d bytes give the error %v", len(data), err)
	}
}

// What is written is what the kernel reads, whatever the strings hold.
func FuzzGoAhead(f *testing.F) {
	f.Add([]byte("c\nA=1\nB=2"), uint8(1))
	f.Add([]byte("/bin/c\nHOME=\nPATH=/a:"), uint8(1))
	f.Add([]byte("\n\x00\n=\n\xff"), uint8(3))
	f.Add(bytes.Repeat([]byte("x"), 70<<10), uint8(9))
	f.Fuzz(func(t *testing.T, data []byte, args uint8) {
		var all []string
		for line := range bytes.SplitSeq(data, []byte("\n")) {
			all = append(all, string(line))
		}
		n := min(1+int(args), len(all))
		g := GoAhead{Argv: all[:n:n], Env: all[n:]}
		var b bytes.Buffer
		if err := WriteGoAhead(&b, g); err != nil {
			if !errors.Is(err, ErrFormat) || !bytes.Contains(data, []byte{0}) && len(data) < MaxGoAhead/64 {
				t.Fatalf("%q: %v", data, err)
			}
			return
		}
		d := decode(t, b.Bytes())
		if !slices.Equal(d.Argv, g.Argv) || !slices.Equal(d.Env, g.Env) {
			t.Fatalf("%q and %q are read as %q and %q", g.Argv, g.Env, d.Argv, d.Env)
		}
	})
}

// What the daemon reads: results, until the FIFO ends.
func FuzzReadResults(f *testing.F) {
	var stream []byte
	for _, r := range []Result{{Kind: Ready}, {Kind: Executing}, {Kind: Failed, Cause: CauseFormat, Errno: 2, Message: "no"}} {
		var b bytes.Buffer
		if err := WriteResult(&b, r); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
		stream = append(stream, b.Bytes()...)
	}
	f.Add([]byte{})
	f.Add(stream)
	f.Add(stream[:len(stream)-1])
	f.Add(append(slices.Clone(stream), stream...))
	f.Add(frame("WSR2", 5, []byte{1, 0, 0, 0, 0}))               // too short
	f.Add(frame("WSR2", 6, []byte{0, 0, 0, 0, 0, 0}))            // no kind
	f.Add(frame("WSR2", 6, []byte{3, 9, 0, 0, 0, 0}))            // no cause
	f.Add(frame("WSR2", maxResult+1, make([]byte, maxResult+1))) // too long
	f.Add(frame("WSR2", 0xffff, []byte{1, 0, 0, 0, 0, 0}))       // a length that lies
	f.Add(frame("WSR2", maxResult, []byte{1, 0, 0, 0, 0, 0}))    // another
	f.Add(frame("WSRS", 6, []byte{1, 0, 0, 0, 0, 0}))            // another version's
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			rest := data[len(data)-r.Len():]
			res, err := ReadResult(r)
			if err != nil {
				known(t, rest, err)
				return
			}
			var b bytes.Buffer
			if err := WriteResult(&b, res); err != nil || !bytes.Equal(rest[:len(rest)-r.Len()], b.Bytes()) {
				t.Fatalf("%q was taken as %+v", rest, res)
			}
		}
	})
}
