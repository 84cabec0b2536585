package handshake

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// decoded is a block as the kernel would read it.
type decoded struct {
	Argv, Env, Paths, ExplainArgv, ExplainEnv []string
	Home                                      bool // there is a place for it, at Env's end
}

// decode follows a block's pointers.
func decode(t testing.TB, b []byte) (d decoded) {
	t.Helper()
	word := func(at uint64) uint64 {
		if at+8 > uint64(len(b)) {
			t.Fatalf("a pointer leads to %d, the block has %d bytes", at, len(b))
		}
		return binary.LittleEndian.Uint64(b[at:])
	}
	if word(0) != BlockMagic || word(BlockSize) != uint64(len(b)) {
		t.Fatalf("magic %x, size %d, the block has %d bytes", word(0), word(BlockSize), len(b))
	}
	texts := func(header uint64) (list []string, end uint64) {
		at := word(header) - BlockAddress
		for ; word(at) != 0; at += 8 {
			text, _, ok := bytes.Cut(b[word(at)-BlockAddress:], []byte{0})
			if !ok {
				t.Fatal("a string without an end")
			}
			list = append(list, string(text))
		}
		return list, at
	}
	d.Argv, _ = texts(BlockArgv)
	var end uint64
	d.Env, end = texts(BlockEnvp)
	d.Paths, _ = texts(BlockPaths)
	d.ExplainArgv, _ = texts(BlockExplainArgv)
	d.ExplainEnv, _ = texts(BlockExplainEnvp)
	if home := word(BlockHome); home != 0 {
		d.Home = true
		if home != BlockAddress+end || word(end+8) != 0 {
			t.Fatalf("HOME has its place at %x, the environment ends at %x", home, BlockAddress+end)
		}
	}
	if at := word(BlockErrno) - BlockAddress; string(b[at:at+3]) != "aa\x00" {
		t.Fatalf("the error number has its place at %q", b[at:at+3])
	}
	return d
}

func goAhead(t testing.TB, g GoAhead) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteGoAhead(&b, g); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestGoAhead(t *testing.T) {
	big := "BIG=" + strings.Repeat("x", 200<<10)
	explain := func(command string) []string { return []string{InitPath, ExplainArg, "aa", command} }
	for name, test := range map[string]struct {
		send GoAhead
		want decoded
	}{
		"least": {
			GoAhead{Argv: []string{"/c"}},
			decoded{Argv: []string{"/c"}, Paths: []string{"/c"}, ExplainArgv: explain("/c"), ExplainEnv: []string{"PATH=", "GOMAXPROCS=1"}, Home: true},
		},
		"few": {
			GoAhead{Argv: []string{"c", "", "ä b"}, Env: []string{"A=1", "PATH=/bin::x:/sbin", "B="}},
			decoded{
				Argv: []string{"c", "", "ä b"}, Env: []string{"A=1", "PATH=/bin::x:/sbin", "B="},
				Paths: []string{"/bin/c", "./c", "./x/c", "/sbin/c"}, ExplainArgv: explain("c"), ExplainEnv: []string{"PATH=/bin::x:/sbin", "GOMAXPROCS=1"}, Home: true,
			},
		},
		"HOME, and the last PATH": {
			GoAhead{Argv: []string{"c"}, Env: []string{"HOME=", "PATH=/a", "PATH=/b", big}},
			decoded{
				Argv: []string{"c"}, Env: []string{"HOME=", "PATH=/a", "PATH=/b", big},
				Paths: []string{"/b/c"}, ExplainArgv: explain("c"), ExplainEnv: []string{"PATH=/b", "GOMAXPROCS=1"},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, decode(t, goAhead(t, test.send))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestNoGoAhead(t *testing.T) {
	for name, g := range map[string]GoAhead{
		"no command":   {Env: []string{"A=1"}},
		"a zero byte":  {Argv: []string{"c"}, Env: []string{"A=1\x002"}},
		"a zero in it": {Argv: []string{"c", "\x00"}},
		"too much":     {Argv: []string{"c"}, Env: []string{"A=" + strings.Repeat("x", MaxGoAhead)}},
	} {
		var b bytes.Buffer
		if err := WriteGoAhead(&b, g); !errors.Is(err, ErrFormat) || b.Len() > 0 {
			t.Errorf("%s: %v, %d bytes written", name, err, b.Len())
		}
	}
}

func TestErrno(t *testing.T) {
	for letters, want := range map[string]uint32{"aa": 0, "ab": 1, "ba": 16, "pp": 255} {
		if got, ok := Errno(letters); !ok || got != want {
			t.Errorf("%q is %d, %t", letters, got, ok)
		}
	}
	for _, letters := range []string{"", "a", "aaa", "aq", "A ", "q1"} {
		if got, ok := Errno(letters); ok {
			t.Errorf("%q is %d", letters, got)
		}
	}
}

func TestResultRoundTrip(t *testing.T) {
	for _, want := range []Result{
		{Kind: Ready},
		{Kind: Executing},
		{Kind: Failed, Cause: CauseExec, Errno: 8, Message: "exec format error"},
	} {
		var b bytes.Buffer
		if err := WriteResult(&b, want); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadResult(&b); err != nil || got != want {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}
	}
}

func TestLongResultIsCutToOneAtomicWrite(t *testing.T) {
	const pipeBuf = 4096
	var b bytes.Buffer
	if err := WriteResult(&b, Result{Kind: Failed, Message: strings.Repeat("m", 100_000)}); err != nil {
		t.Fatal(err)
	}
	if b.Len() > pipeBuf {
		t.Fatalf("%d bytes are more than a pipe takes at once", b.Len())
	}
	if res, err := ReadResult(&b); err != nil || !strings.HasPrefix(res.Message, "mmm") {
		t.Fatalf("got %+v, %v", res, err)
	}
}
