package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/server/loop"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// get asks for a path over HTTP on a unix socket.
func get(t *testing.T, socket, path string) (code int, body string) {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 20 * time.Second}
	resp, err := client.Get("http://workspaced" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// figures are the lines of our own metrics.
func figures(body string) (lines []string) {
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "workspaced_") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

func TestMetrics(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var log syncBuffer
	m := &metrics{
		loops: func() []loop.Status {
			return []loop.Status{
				{Name: "sweep", LastBeat: time.UnixMilli(1_700_000_000_500), Restarts: 3, Panics: 1, LastError: errors.New("token=hunter2")},
				{Name: "store", Stale: true},
			}
		},
		commits:    new(commitCounter),
		supervisor: workspace.New(workspace.Config{}),
		limited:    func() map[string]uint64 { return map[string]uint64{"RATE_LIMITED": 7, "TOO_MANY_CALLS": 0} },
		refused:    func() uint64 { return 9 },
	}
	m.commits.OnCommit([]store.Change{{ID: "a"}, {ID: "b"}})
	m.commits.OnCommit([]store.Change{{ID: "a"}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- newMetricsServer(m, l, slog.New(slog.NewTextHandler(&log, nil))).run(ctx) }()

	code, body := get(t, socket, "/metrics")
	if code != http.StatusOK || strings.Contains(body, "hunter2") {
		t.Errorf("status %d:\n%s", code, body)
	}
	want := []string{
		`workspaced_calls_limited_total{reason="RATE_LIMITED"} 7`,
		`workspaced_calls_limited_total{reason="TOO_MANY_CALLS"} 0`,
		`workspaced_connections_refused_total 9`,
		`workspaced_cycles_total 0`,
		`workspaced_loop_heartbeat_timestamp_seconds{loop="sweep"} 1.7000000005e+09`,
		`workspaced_loop_panics_total{loop="store"} 0`,
		`workspaced_loop_panics_total{loop="sweep"} 1`,
		`workspaced_loop_restarts_total{loop="store"} 0`,
		`workspaced_loop_restarts_total{loop="sweep"} 3`,
		`workspaced_loop_stale{loop="store"} 1`,
		`workspaced_loop_stale{loop="sweep"} 0`,
		`workspaced_orphans_removed_total 0`,
		`workspaced_panics_total 0`,
		`workspaced_store_changes_total 3`,
		`workspaced_store_commits_total 2`,
	}
	if diff := cmp.Diff(want, figures(body)); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"go_goroutines ", "process_resident_memory_bytes "} {
		if !strings.Contains(body, "\n"+name) {
			t.Errorf("there is no %s", name)
		}
	}
	for _, path := range []string{"/", "/debug/pprof/"} {
		if code, _ := get(t, socket, path); code != http.StatusNotFound {
			t.Errorf("%s: status %d", path, code)
		}
	}

	// A client that says nothing does not keep it from ending.
	silent, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("unix", socket); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	if log.String() != "" {
		t.Errorf("log:\n%s", &log)
	}
}

// A listener that breaks is an error of the daemon, with its address.
func TestMetricsListenerBreaks(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	m := newMetricsServer(&metrics{}, l, slog.New(slog.DiscardHandler))
	if err := m.run(t.Context()); err == nil || !strings.Contains(err.Error(), fmt.Sprint(l.Addr())) {
		t.Errorf("got %v", err)
	}
}
