package workspace

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

func TestLaunchOf(t *testing.T) {
	secret := func(k, v string, version int64) store.OpenedSecret {
		return store.OpenedSecret{Key: k, Version: version, Value: seal.New([]byte(v))}
	}
	tests := []struct {
		name    string
		spec    store.Spec
		model   string
		secrets []store.OpenedSecret
		want    []string // before the daemon's own

		versions map[string]int64
	}{
		{name: "nothing"},
		{name: "spec's, sorted", spec: store.Spec{Env: map[string]string{"B": "2", "A": "1"}}, want: []string{"A=1", "B=2"}},
		{
			name: "a secret wins over the spec's", spec: store.Spec{Env: map[string]string{"A": "plain"}},
			secrets: []store.OpenedSecret{secret("A", "secret", 7)}, want: []string{"A=plain", "A=secret"},
			versions: map[string]int64{"A": 7},
		},
		{name: "model", model: "m", want: []string{"MODEL_PROVIDER=m"}},
		{name: "no model", spec: store.Spec{ModelEnv: []string{"X"}}},
		{
			name: "the model wins over a global secret", spec: store.Spec{ModelEnv: []string{"X", "Y"}}, model: "m",
			secrets: []store.OpenedSecret{secret("S", "s", 2), secret("Y", "s", 1)}, want: []string{"S=s", "Y=s", "X=m", "Y=m"},
			versions: map[string]int64{"S": 2},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sn := store.Snapshot{Workspace: store.Workspace{ID: "a", UID: "u", Model: tt.model}, Secrets: tt.secrets}
			got, err := launchOf(&tt.spec, &sn, 5)
			if err != nil {
				t.Fatal(err)
			}
			want := append(tt.want, "WORKSPACE_ID=a", "WORKSPACE_UID=u", "WORKSPACE_GENERATION=5")
			if diff := cmp.Diff(want, got.Env); diff != "" {
				t.Errorf("env (-want +got):\n%s", diff)
			}
			if got.Generation != 5 {
				t.Errorf("generation %d, want 5", got.Generation)
			}
			if diff := cmp.Diff(tt.versions, got.SecretVersions, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("versions (-want +got):\n%s", diff)
			}
		})
	}
}

// The largest secrets and environment that the API takes fit; a command line
// that takes the rest does not.
func TestEnvironmentFits(t *testing.T) {
	sn := store.Snapshot{Workspace: store.Workspace{ID: "a"}}
	for size := 0; size < store.MaxWorkspaceBytes+store.MaxGlobalBytes; size += store.MaxValueBytes {
		sn.Secrets = append(sn.Secrets, store.OpenedSecret{
			Key: fmt.Sprintf("K%d", size), Value: seal.New([]byte(strings.Repeat("x", store.MaxValueBytes))),
		})
	}
	spec := store.Spec{Env: make(map[string]string)}
	for i := range 8 {
		spec.Env[fmt.Sprintf("E%d", i)] = strings.Repeat("y", 32<<10)
	}
	if _, err := launchOf(&spec, &sn, 1); err != nil {
		t.Errorf("the largest environment does not fit: %v", err)
	}
	spec.Args = make([]string, 32)
	for i := range spec.Args {
		spec.Args[i] = strings.Repeat("z", 32<<10)
	}
	_, err := launchOf(&spec, &sn, 1)
	var re *runtime.Error
	if !errors.As(err, &re) || re.Reason != runtime.ReasonEnvironmentTooLarge {
		t.Errorf("err = %v, want ENVIRONMENT_TOO_LARGE", err)
	}
	_, err = launchOf(&store.Spec{Args: []string{strings.Repeat("z", 128<<10)}}, &store.Snapshot{}, 1)
	if !errors.As(err, &re) || re.Reason != runtime.ReasonEnvironmentTooLarge {
		t.Errorf("one long argument: err = %v, want ENVIRONMENT_TOO_LARGE", err)
	}
}
