package server

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/store"
)

func TestFilterMatches(t *testing.T) {
	running := store.Workspace{
		ID: "db-1", Model: "gpt-4", Generation: 2,
		Labels: map[string]string{"team": "a", "app.kubernetes.io/name": "x", "env-type": "prod"},
		Status: store.Status{ObservedGeneration: 2, Running: &store.Running{InstanceID: "i"}},
	}
	stopped := store.Workspace{ID: "web", Parked: true, Generation: 1}
	for _, tt := range []struct {
		filter           string
		running, stopped bool
	}{
		{``, true, true},
		{`   `, true, true},
		{`state = RUNNING`, true, false},
		{`state = WORKSPACE_STATE_RUNNING`, true, false},
		{`state = "RUNNING"`, true, false},
		{`state="WORKSPACE_STATE_STOPPED"`, false, true},
		{`state != RUNNING`, false, true},
		{`NOT state = RUNNING`, false, true},
		{`-state = RUNNING`, false, true},
		{`parked`, false, true},
		{`parked = true`, false, true},
		{`parked = false`, true, false},
		{`parked != true`, true, false},
		{`NOT parked`, true, false},
		{`reconciling = false`, true, true},
		{`true`, true, true},
		{`name = "workspaces/db-1"`, true, false},
		{`name = "workspaces/db*"`, true, false},
		{`name = "*web"`, false, true},
		{`name = "*b*"`, true, true},
		{`name = "*"`, true, true},
		{`name:"db"`, true, false},
		{`model = "gpt-4"`, true, false},
		{`model = ""`, false, true},
		{`model:*`, true, false},
		{`model:"gpt"`, true, false},
		{`labels.team = "a"`, true, false},
		{`labels.team = "b"`, false, false},
		{`labels.team != "a"`, false, true},
		{`labels.team:*`, true, false},
		{`labels.team:"a"`, true, false},
		{`labels.team:"b"`, false, false},
		{`labels:team`, true, false},
		{`labels:"app.kubernetes.io/name"`, true, false},
		{`labels:*`, true, false},
		{`labels."app.kubernetes.io/name" = "x"`, true, false},
		{`labels."env-type" = "prod"`, true, false},
		{`state = RUNNING AND labels.team = "a"`, true, false},
		{`state = RUNNING AND labels.team = "b"`, false, false},
		{`state = RUNNING OR state = STOPPED`, true, true},
		{`parked OR labels.team = "a" AND state = STOPPED`, false, true}, // OR binds tighter (AIP-160)
		{`(parked AND state = STOPPED) OR model = "gpt-4"`, true, true},
		{`NOT (parked OR labels.team = "a")`, false, false},
	} {
		t.Run(tt.filter, func(t *testing.T) {
			f, err := parseFilter(tt.filter)
			if err != nil {
				t.Fatal(err)
			}
			if got := f.match(&running); got != tt.running {
				t.Errorf("running: got %v", got)
			}
			if got := f.match(&stopped); got != tt.stopped {
				t.Errorf("stopped: got %v", got)
			}
		})
	}
}

func TestFilterRefuses(t *testing.T) {
	for _, tt := range []struct{ filter, wants string }{
		{`flavour = "x"`, "flavour"},
		{`state = FLYING`, "FLYING"},
		{`state = "FLYING"`, "STOPPED"},
		{`state = UNSPECIFIED`, "STOPPED"},
		{`state`, "bool"},
		{`name`, "bool"},
		{`"x"`, "bool"},
		{`parked = "true"`, "operands"},
		{`name = 3`, "operands"},
		{`name > "a"`, "'>'"},
		{`name = model`, "value"},
		{`"workspaces/a" = name`, "left"},
		{`state = RUNNING parked`, "AND or OR"},
		{`labels.team = labels.other`, "value"},
		{`labels = "x"`, "operands"},
		{`labels.a.b = "x"`, "operand"},
		{`parked AND`, ":"},
		{`(parked`, ":"},
		{`parked)`, ":"},
		{`name = "x`, ":"},
		{`f(name)`, "'f'"},
		{"\x00", ":"},
	} {
		t.Run(tt.filter, func(t *testing.T) {
			_, err := parseFilter(tt.filter)
			var api *apiError
			if !errors.As(err, &api) || status.Code(err) != codes.InvalidArgument {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(err.Error(), tt.wants) {
				t.Errorf("%q does not tell about %q", err, tt.wants)
			}
		})
	}
}

// Deep nesting must cost no more than its length.
func TestFilterOfTheGreatestLengthIsQuick(t *testing.T) {
	for _, unit := range []string{"(", "NOT ", "-", "a(", "parked OR ", "a.", "((NOT ", `"`} {
		start := time.Now()
		_, _ = parseFilter(strings.Repeat(unit, 2048/len(unit)))
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("%q took %v", unit, d)
		}
	}
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{
		``, `state = RUNNING AND labels.team = "a"`, `NOT (parked OR reconciling)`, `labels:team`, `-name:"a"`,
		`labels."a.b" != "*"`, `a(b, "c")`, `((`, `name = -1.5`, "\xff", `true = false`, `duration("1s")`,
	} {
		f.Add(s)
	}
	w := store.Workspace{ID: "a", Labels: map[string]string{"team": "a"}}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > 2048 {
			t.Skip()
		}
		filter, err := parseFilter(s)
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		_ = filter.match(&w)
	})
}
