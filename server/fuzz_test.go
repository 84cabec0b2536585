package server

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A resume token is the one of a place, or none: nothing else is taken for one.
func FuzzResumeToken(f *testing.F) {
	place := position{Instance: "7e9c4b9e-1f2c-4a35-8a36-5f1f2a3b4c5d", Since: 3, Revision: 1 << 40}
	token := encodeToken(place, "watch")
	f.Add(token)
	f.Add(token[:len(token)-1])
	f.Add(strings.ToUpper(token))
	f.Add(encodeToken(place, "workspaces"))
	f.Add(encodeToken([]int{1}, "watch"))
	f.Add("====")
	f.Fuzz(func(t *testing.T, token string) {
		var p, again position
		if !decodeToken(token, &p, "watch") {
			return
		}
		if !decodeToken(encodeToken(p, "watch"), &again, "watch") || again != p {
			t.Errorf("%+v becomes %+v", p, again)
		}
	})
}

// A name that is taken is the one that its parts make, and no other resource's.
func FuzzName(f *testing.F) {
	for _, s := range []string{
		"workspaces/a", "workspaces/a/secrets/K", "secrets/K", "global", "workspaces/-", "workspaces/", "workspaces//secrets/K",
		"//host/workspaces/a", "workspaces/a/secrets/K/x", "workspaces/{workspace}", "\xff", "workspaces/a\x00", "secrets/../workspaces/a",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		refused := func(err error) bool {
			if err != nil && status.Code(err) != codes.InvalidArgument {
				t.Fatalf("%q: %v", name, err)
			}
			return err != nil
		}
		if id, err := parseWorkspaceName("name", name); !refused(err) && workspaceName(id) != name {
			t.Errorf("%q is taken for the workspace %q", name, id)
		}
		if scope, key, err := parseSecretName("name", name); !refused(err) && secretName(scope.WorkspaceID, key) != name {
			t.Errorf("%q is taken for the secret %q of %+v", name, key, scope)
		}
		if scope, err := parseParent("parent", name); !refused(err) && scopeName(scope) != name {
			t.Errorf("%q is taken for the parent %+v", name, scope)
		}
	})
}
