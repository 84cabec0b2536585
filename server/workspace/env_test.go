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
		return store.OpenedSecret{Key: k, Version: version, Value: seal.New([]byte(v)), Delivery: store.DeliverySpec}
	}
	by := func(d store.Delivery, s store.OpenedSecret) store.OpenedSecret {
		s.Delivery = d
		return s
	}
	type test struct {
		name    string
		spec    store.Spec
		model   string
		secrets []store.OpenedSecret
		want    []string // before the daemon's own

		files    map[string]string
		versions map[string]int64
		globals  []string
	}
	tests := []test{
		{name: "nothing"},
		{name: "spec's, sorted", spec: store.Spec{Env: map[string]string{"B": "2", "A": "1"}}, want: []string{"A=1", "B=2"}},
		{
			name: "a secret wins over the spec's", spec: store.Spec{Env: map[string]string{"A": "plain"}},
			secrets: []store.OpenedSecret{secret("A", "secret", 7)}, want: []string{"A=plain", "A=secret"},
			versions: map[string]int64{"A": 7},
		},
		{
			name: "global ones are told from own ones", secrets: []store.OpenedSecret{global(secret("A", "a", 1)), secret("B", "b", 2), global(secret("C", "c", 3))},
			want: []string{"A=a", "B=b", "C=c"}, versions: map[string]int64{"A": 1, "B": 2, "C": 3}, globals: []string{"A", "C"},
		},
		{
			name: "a global one that the model hides is none", model: "m", secrets: []store.OpenedSecret{global(secret("MODEL_PROVIDER", "s", 1))},
			want: []string{"MODEL_PROVIDER=m"},
		},
		{name: "model", model: "m", want: []string{"MODEL_PROVIDER=m"}},
		{name: "no model", spec: store.Spec{ModelEnv: []string{"X"}}},
		{
			name: "the model wins over a global secret", spec: store.Spec{ModelEnv: []string{"X", "Y"}}, model: "m",
			secrets: []store.OpenedSecret{secret("S", "s", 2), secret("Y", "s", 1)}, want: []string{"S=s", "X=m", "Y=m"},
			versions: map[string]int64{"S": 2},
		},
	}
	tests = append(tests, []test{
		{
			name: "a file is no variable, and hides none", spec: store.Spec{Env: map[string]string{"B": "/run/secrets/B"}},
			secrets: []store.OpenedSecret{secret("A", "a", 1), by(store.DeliveryFiles, secret("B", "b\x00", 2))},
			want:    []string{"B=/run/secrets/B", "A=a"}, files: map[string]string{"B": "b\x00"}, versions: map[string]int64{"A": 1, "B": 2},
		},
		{
			name: "the spec says files", spec: store.Spec{SecretDelivery: store.DeliveryFiles},
			secrets: []store.OpenedSecret{secret("A", "a", 1), by(store.DeliveryEnv, secret("B", "b", 2))},
			want:    []string{"B=b"}, files: map[string]string{"A": "a"}, versions: map[string]int64{"A": 1, "B": 2},
		},
		{
			name: "the model wins over a global file", spec: store.Spec{SecretDelivery: store.DeliveryFiles}, model: "m",
			secrets: []store.OpenedSecret{secret("MODEL_PROVIDER", "s", 1)}, want: []string{"MODEL_PROVIDER=m"},
		},
	}...)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sn := store.Snapshot{Workspace: store.Workspace{ID: "a", UID: "u", Model: tt.model}, Secrets: tt.secrets}
			got, err := launchOf(&tt.spec, &sn, 5, seal.Plaintext{})
			if err != nil {
				t.Fatal(err)
			}
			want := append(tt.want, "WORKSPACE_ID=a", "WORKSPACE_UID=u", "WORKSPACE_GENERATION=5")
			if diff := cmp.Diff(want, got.Env); diff != "" {
				t.Errorf("env (-want +got):\n%s", diff)
			}
			files := make(map[string]string)
			for _, f := range got.Files {
				files[f.Name] = string(f.Data)
			}
			if diff := cmp.Diff(tt.files, files, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			if got.Generation != 5 {
				t.Errorf("generation %d, want 5", got.Generation)
			}
			if diff := cmp.Diff(tt.globals, got.GlobalSecrets); diff != "" {
				t.Error(diff)
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
	// Files count for nothing.
	sn.Secrets = append(sn.Secrets, store.OpenedSecret{Key: "FILE", Value: seal.New(make([]byte, 4<<20)), Delivery: store.DeliveryFiles})
	spec := store.Spec{Env: make(map[string]string)}
	for i := range 8 {
		spec.Env[fmt.Sprintf("E%d", i)] = strings.Repeat("y", 32<<10)
	}
	if _, err := launchOf(&spec, &sn, 1, seal.Plaintext{}); err != nil {
		t.Errorf("the largest environment does not fit: %v", err)
	}
	spec.Args = make([]string, 32)
	for i := range spec.Args {
		spec.Args[i] = strings.Repeat("z", 32<<10)
	}
	_, err := launchOf(&spec, &sn, 1, seal.Plaintext{})
	var re *runtime.Error
	if !errors.As(err, &re) || re.Reason != runtime.ReasonEnvironmentTooLarge {
		t.Errorf("err = %v, want ENVIRONMENT_TOO_LARGE", err)
	}
	// What was a file by a newer spec can't be a variable by this one.
	binary := store.Snapshot{Secrets: []store.OpenedSecret{{Key: "K", Value: seal.New([]byte("canary\x00")), Delivery: store.DeliverySpec}}}
	_, err = launchOf(&store.Spec{}, &binary, 1, seal.Plaintext{})
	if !errors.As(err, &re) || re.Reason != reasonSecretUnreadable || !strings.Contains(re.Message, "K") || strings.Contains(re.Message, "canary") {
		t.Errorf("a NUL: err = %v", err)
	}
	_, err = launchOf(&store.Spec{Args: []string{strings.Repeat("z", 128<<10)}}, &store.Snapshot{}, 1, seal.Plaintext{})
	if !errors.As(err, &re) || re.Reason != runtime.ReasonEnvironmentTooLarge {
		t.Errorf("one long argument: err = %v, want ENVIRONMENT_TOO_LARGE", err)
	}
}

func global(s store.OpenedSecret) store.OpenedSecret {
	s.Global = true
	return s
}
