package handshake

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func goAhead(t testing.TB, env ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteGoAhead(&b, GoAhead{Env: env}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestGoAheadRoundTrip(t *testing.T) {
	for name, env := range map[string][]string{
		"none":   {},
		"few":    {"A=1", "B=", "C=ä\n\x00z"},
		"larger": {"BIG=" + strings.Repeat("x", 200<<10), "", "LAST=1"},
	} {
		t.Run(name, func(t *testing.T) {
			// One byte at a time, as a pipe may hand it over.
			got, err := ReadGoAhead(iotest.OneByteReader(bytes.NewReader(goAhead(t, env...))))
			if err != nil || !slices.Equal(got.Env, env) {
				t.Fatalf("got %d strings, %v", len(got.Env), err)
			}
		})
	}
}

func TestCutGoAheadIsNoMessage(t *testing.T) {
	whole := goAhead(t, "SECRET=value", "OTHER=value")
	for n := range len(whole) {
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if _, err := ReadGoAhead(bytes.NewReader(whole[:n])); !errors.Is(err, want) {
			t.Fatalf("%d of %d bytes: error %v, want %v", n, len(whole), err, want)
		}
	}
}

func TestChangedGoAheadIsNoMessage(t *testing.T) {
	whole := goAhead(t, "SECRET=value")
	for i := range whole {
		changed := slices.Clone(whole)
		changed[i] ^= 0x20
		if _, err := ReadGoAhead(bytes.NewReader(changed)); err == nil {
			t.Fatalf("byte %d changed, and it was taken", i)
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
