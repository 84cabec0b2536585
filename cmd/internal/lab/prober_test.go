package lab

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// serveID is an envserver: it takes the socket's place and says id.
func serveID(t *testing.T, socket, id string) *httptest.Server {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket + "." + id, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, id)
	})}}
	s.Start()
	t.Cleanup(s.Close)
	if err := os.Rename(socket+"."+id, socket); err != nil {
		t.Fatal(err)
	}
	return s
}

// However fast the switches are: each that was awaited is counted.
func TestProberCountsEverySwitch(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	socket := filepath.Join(t.TempDir(), "s")
	want := []string{"a", "b", "c", "d"}
	serving := serveID(t, socket, want[0])
	prober := Probe(socket)
	defer prober.Stop()
	for i, id := range want {
		if i > 0 {
			old := serving
			serving = serveID(t, socket, id)
			old.CloseClientConnections()
			old.Close()
		}
		if err := prober.Await(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	down := prober.Stop()
	if diff := cmp.Diff(want, down.Starts); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if len(down.Gaps) != len(want)-1 || down.Overlaps != 0 || down.Median() <= 0 || down.Max() < down.Median() {
		t.Errorf("%+v", down)
	}
}

func TestProberAwaitEnds(t *testing.T) {
	prober := Probe(filepath.Join(t.TempDir(), "nobody"))
	defer prober.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := prober.Await(ctx, "a"); err == nil {
		t.Error("saw what nobody answered")
	}
	prober.Stop()
	if err := prober.Await(context.Background(), "a"); err == nil {
		t.Error("saw what nobody answered, after its end")
	}
}

func TestProberRecord(t *testing.T) {
	p := &Prober{changed: make(chan struct{})}
	for _, step := range []struct {
		id    string
		err   error
		since time.Duration
		want  bool
	}{
		{err: io.EOF},
		{id: "a", since: time.Hour, want: true}, // nothing answered before
		{id: "a", since: 1, want: true},
		{err: io.EOF},
		{id: "b", since: 7, want: true},
		{id: "a", since: 1},
		{id: "c", since: 3, want: true},
	} {
		if got := p.record(step.id, step.err, step.since); got != step.want {
			t.Errorf("%+v: %v", step, got)
		}
	}
	want := Downtime{Answers: 4, Failures: 2, Starts: []string{"a", "b", "c"}, Gaps: []time.Duration{7, 3}, Overlaps: 1}
	if diff := cmp.Diff(want, p.down); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
