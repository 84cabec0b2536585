package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const (
		pass = `{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
`
		end     = `{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}` + "\n" + `{"Action":"pass","Package":"p"}` + "\n"
		endFail = `{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}` + "\n" + `{"Action":"fail","Package":"p"}` + "\n"
		skip    = `{"Action":"output","Package":"p","Test":"TestS","Output":"    a_test.go:8: needs containerd\n"}
{"Action":"output","Package":"p","Test":"TestS","Output":"--- SKIP: TestS (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestS"}
`
	)
	tests := []struct {
		name   string
		events string
		ci     bool
		ok     bool
		want   []string
		absent []string
	}{
		{
			name: "passed", events: pass + end, ok: true, ci: true,
			want:   []string{"ok  \tp\t0.1s\n", "1 passed, 0 failed, 0 skipped"},
			absent: []string{"chatter", "SKIPPED"},
		},
		{
			name: "failed", ok: false,
			events: `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: got 1\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
` + endFail,
			want: []string{"got 1", "FAIL\tp", "FAIL p TestB", "0 passed, 1 failed"},
		},
		{
			name: "died in a test", ok: false,
			events: pass + `{"Action":"output","Package":"p","Test":"TestC","Output":"panic: x\n"}` + "\n" + endFail,
			want:   []string{"panic: x", "FAIL p TestC"},
		},
		{
			name: "failed outside of a test", ok: false,
			events: pass + `{"Action":"output","Package":"p","Output":"LEFT BEHIND, mounts\n"}` + "\n" + endFail,
			want:   []string{"LEFT BEHIND, mounts", "FAIL p: outside of its tests"},
		},
		{
			name: "does not build", ok: false,
			events: `{"ImportPath":"p","Action":"build-output","Output":"a.go:1: syntax error\n"}` + "\n" + endFail,
			want:   []string{"syntax error", "FAIL p: outside of its tests"},
		},
		{
			name: "skipped at home", events: pass + skip + end, ok: true,
			want: []string{"!!! 1 SKIPPED", "p TestS: a_test.go:8: needs containerd"},
		},
		{
			name: "skipped in CI", events: pass + skip + end, ci: true, ok: false,
			want: []string{"FAIL p TestS: must not be skipped in CI"},
		},
		{
			name: "slow", events: `{"Action":"pass","Package":"p","Test":"TestA","Elapsed":1.5}
{"Action":"pass","Package":"p","Test":"TestB/one","Elapsed":19}
{"Action":"pass","Package":"p","Test":"TestB/one/part","Elapsed":18}
{"Action":"pass","Package":"p","Test":"TestB","Elapsed":20}
{"Action":"pass","Package":"p","Test":"TestC","Elapsed":0.9}
` + end, ok: true,
			want:   []string{"the slowest tests:\n    20.0 s  p TestB\n    19.0 s  p TestB/one\n     1.5 s  p TestA\n\n5 passed"},
			absent: []string{"part", "TestC"},
		},
		{name: "nothing ran", events: end, ok: false, want: []string{"FAIL no test ran"}},
		{name: "other lines", events: "make: note\n" + pass + end, ok: true, want: []string{"make: note\n"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			r := &report{out: &out, running: make(map[testID]*strings.Builder)}
			if err := r.read(strings.NewReader(test.events)); err != nil {
				t.Fatal(err)
			}
			if ok := r.summarize(test.ci); ok != test.ok {
				t.Errorf("summarize(%v) = %v, want %v", test.ci, ok, test.ok)
			}
			for _, want := range test.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("%q is missing in:\n%s", want, out.String())
				}
			}
			for _, absent := range test.absent {
				if strings.Contains(out.String(), absent) {
					t.Errorf("%q is in:\n%s", absent, out.String())
				}
			}
		})
	}
}
