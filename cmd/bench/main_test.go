package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/cmd/bench/internal/rows"
)

// row returns one that measures 2 beside 4 and notes that it ran.
func row(name string, ran *[]string, err error) rows.Row {
	return rows.Row{Name: name, What: "what " + name + " is", Limit: time.Minute, Run: func(context.Context, *rows.Env) ([]measure.Result, error) {
		*ran = append(*ran, name)
		return []measure.Result{measure.Compare(name+"/figure", "ms", measure.Samples{2}, "another", measure.Samples{4}, measure.MedianAtMost(1))}, err
	}}
}

func TestBench(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: the benchmark runs as root")
	}
	broken := errors.New("broken")
	for _, c := range []struct {
		name    string
		what    []string
		fails   bool // row b does
		ran     string
		results int
		err     string
	}{
		{name: "all", ran: "a b c", results: 3},
		{name: "one", what: []string{"b"}, ran: "b", results: 1},
		{name: "none such", what: []string{"d"}, err: `no row "d"`},
		{name: "a row that fails costs no other", fails: true, ran: "a b c", results: 3, err: "b: broken"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ran []string
			var err error
			if c.fails {
				err = broken
			}
			all := []rows.Row{row("a", &ran, nil), row("b", &ran, err), row("c", &ran, nil)}
			dir := t.TempDir()
			if err := os.Chown(dir, 1234, 5678); err != nil {
				t.Fatal(err)
			}
			o := options{what: c.what, json: filepath.Join(dir, "bench.json"), report: filepath.Join(dir, "report.md"), command: "make this"}
			var out strings.Builder
			err = bench(t.Context(), all, o, &out)
			if (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if got := strings.Join(ran, " "); got != c.ran {
				t.Errorf("ran %q, want %q", got, c.ran)
			}
			if c.results > 0 {
				checkJSON(t, o.json, c.results)
			}
			if report, _ := os.ReadFile(o.report); (c.err == "") != strings.Contains(string(report), "| a/figure | 2.00 | 2.00 | ms | another | 4.00 | 0.5 | median ≤ 1 | **missed** |") && c.what == nil {
				t.Errorf("report:\n%s", report)
			}
			if c.results > 0 && !strings.Contains(out.String(), "MISSED") {
				t.Errorf("output:\n%s", out.String())
			}
		})
	}
}

// checkJSON checks that the file has so many objects with the agreed keys.
func checkJSON(t *testing.T, path string, n int) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != 1234 || st.Gid != 5678 {
		t.Errorf("%s belongs to %d:%d, %v, want who its directory belongs to", path, st.Uid, st.Gid, err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var results []map[string]any
	if err := json.Unmarshal(b, &results); err != nil || len(results) != n {
		t.Fatalf("%v, want %d results:\n%s", err, n, b)
	}
	var keys []string
	for k := range results[0] {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	want := []string{"beside", "beside_median", "goal", "holds", "name", "ours_median", "ours_p95", "ratio", "unit"}
	if diff := cmp.Diff(want, keys); diff != "" {
		t.Error(diff)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.01234: "0.0123", 1.234: "1.23", 12.34: "12.3", 1234.5: "1234", 11300: "11300"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
}

// Every row can be chosen by its name and says what it is.
func TestRows(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rows.All {
		if r.Name == "" || r.What == "" || r.Limit <= 0 || r.Run == nil || seen[r.Name] {
			t.Errorf("row %+v", r)
		}
		seen[r.Name] = true
	}
}
