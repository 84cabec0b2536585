package fault_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

func TestParse(t *testing.T) {
	got, err := fault.Parse("a.b:before:error, c:after:kill:2,d:before:hang:1:0")
	want := []fault.Rule{
		{Step: "a.b", Moment: fault.Before, Action: fault.Error, Times: 1},
		{Step: "c", Moment: fault.After, Action: fault.Kill, Skip: 2, Times: 1},
		{Step: "d", Moment: fault.Before, Action: fault.Hang, Skip: 1},
	}
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v, %s", err, cmp.Diff(want, got))
	}
	for _, r := range want {
		if again, err := fault.Parse(r.String()); err != nil || !cmp.Equal(again, []fault.Rule{r}) {
			t.Errorf("%v is read as %v, %v", r, again, err)
		}
	}
	for _, bad := range []string{"a", "a:before", "a:now:error", "a:before:explode", "a:before:error:x", "a:before:error:-1", "a:before:error:1:1:1"} {
		if _, err := fault.Parse(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestAround(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		killed := 0
		in := fault.New()
		in.Kill = func() { killed++ }
		done := 0
		around := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = p.(error)
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			return in.Around(ctx, "s", func(context.Context) error { done++; return nil })
		}
		for _, test := range []struct {
			rules    string
			want     []error // of one pass after another
			done     int
			killed   int
			hangsFor time.Duration
		}{
			{rules: "", want: []error{nil}, done: 1},
			{rules: "other:before:error", want: []error{nil}, done: 1},
			{rules: "s:before:error", want: []error{fault.ErrInjected, nil}, done: 1},
			{rules: "s:after:error:1:2", want: []error{nil, fault.ErrInjected, fault.ErrInjected, nil}, done: 4},
			{rules: "s:before:error:0:0", want: []error{fault.ErrInjected, fault.ErrInjected}},
			{rules: "s:before:panic,s:after:panic", want: []error{fault.ErrInjected, fault.ErrInjected, nil}, done: 2},
			{rules: "s:before:hang", want: []error{context.DeadlineExceeded, nil}, done: 1, hangsFor: time.Minute},
			{rules: "s:after:kill", want: []error{fault.ErrInjected}, done: 1, killed: 1},
		} {
			rules, err := fault.Parse(test.rules)
			if err != nil {
				t.Fatal(err)
			}
			in.Set(rules...)
			done, killed = 0, 0
			begin := time.Now()
			for i, want := range test.want {
				if err := around(); !errors.Is(err, want) {
					t.Errorf("%s: pass %d gives %v, want %v", test.rules, i, err, want)
				}
			}
			if done != test.done || killed != test.killed || time.Since(begin) != test.hangsFor {
				t.Errorf("%s: done %d times, killed %d times, after %v", test.rules, done, killed, time.Since(begin))
			}
		}
		if n := in.Strikes()[fault.Strike{Point: fault.Point{Step: "s", Moment: fault.Before}, Action: fault.Error}]; n != 3 {
			t.Errorf("%d errors were counted before s", n)
		}
		if n := in.Passed()[fault.Point{Step: "s", Moment: fault.After}]; n == 0 {
			t.Error("no pass was counted")
		}
	})
}
