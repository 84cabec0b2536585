package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

func TestServe(t *testing.T) {
	dir, err := os.MkdirTemp("", "rivals") // t.TempDir's names are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	requests := `{"run":"workqueue-add","clients":4,"ops":1000}
{"run":"etcd-put","clients":1,"connections":1,"ops":5,"size":10}
{"run":"etcd-put","clients":3,"connections":2,"ops":10,"size":10}
{"run":"etcd-put","clients":3,"connections":3,"ops":2,"size":10}
{"run":"etcd-put","clients":3,"ops":10,"size":10}
{"run":"none","clients":1,"ops":1}
`
	var out bytes.Buffer
	if err := serve(t.Context(), dir, strings.NewReader(requests), &out); err != nil {
		t.Fatal(err)
	}
	answers := json.NewDecoder(&out)
	for i, want := range []struct {
		latencies int
		fails     bool
	}{{0, false}, {5, false}, {10, false}, {0, true}, {0, true}, {0, true}} {
		var a Answer
		if err := answers.Decode(&a); err != nil {
			t.Fatal(err)
		}
		if len(a.Latencies) != want.latencies || (a.Error != "") != want.fails || (a.Nanoseconds > 0) == want.fails {
			t.Errorf("answer %d: %+v", i, a)
		}
		for _, l := range a.Latencies {
			if l <= 0 {
				t.Errorf("answer %d: an operation took %d ns", i, l)
			}
		}
	}
	if err := serve(t.Context(), dir, strings.NewReader("rubbish\n"), &out); err == nil {
		t.Error("rubbish was taken for a request")
	}
}
