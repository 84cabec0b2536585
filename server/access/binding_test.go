package access

import (
	"os/user"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

func TestParseBindings(t *testing.T) {
	root, err := user.LookupId("0")
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroupId("0")
	if err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]Binding{
		"unix:uid=7 viewer":                             {"unix:uid=7", Grant{Roles: RolesOf(workspacev1.Role_ROLE_VIEWER)}},
		"unix:user=" + root.Username + " viewer":        {"unix:uid=0", Grant{Roles: RolesOf(workspacev1.Role_ROLE_VIEWER)}},
		"unix:group=" + group.Name + " admin":           {"unix:gid=0", Grant{Roles: RolesOf(workspacev1.Role_ROLE_ADMIN)}},
		"unix:socket-group  operator+secret-writer":     {"unix:gid=42", Grant{Roles: RolesOf(workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER)}},
		"insecure viewer name=a":                        {"insecure", Grant{RolesOf(workspacev1.Role_ROLE_VIEWER), Scope{Workspaces: "a"}}},
		"cert:spiffe://example.org/ci viewer name=a-*":  {"cert:spiffe://example.org/ci", Grant{RolesOf(workspacev1.Role_ROLE_VIEWER), Scope{Workspaces: "a-*"}}},
		"cert:dns=x.org viewer label=team=a label=b=":   {"cert:dns=x.org", Grant{RolesOf(workspacev1.Role_ROLE_VIEWER), Scope{Labels: map[string]string{"team": "a", "b": ""}}}},
		"cert:cn=x operator name=a-* label=x.y/z=1=2=3": {"cert:cn=x", Grant{RolesOf(workspacev1.Role_ROLE_OPERATOR), Scope{Workspaces: "a-*", Labels: map[string]string{"x.y/z": "1=2=3"}}}},
	} {
		got, err := ParseBindings([]string{line}, 42)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if diff := cmp.Diff(want, got[1]); diff != "" {
			t.Errorf("%s: %s", line, diff)
		}
	}
	for line, want := range map[string]string{
		"":                                    "must be a subject and its roles",
		"unix:uid=7":                          "must be a subject and its roles",
		"unix:uid=x viewer":                   "is no number",
		"unix:uid=-1 viewer":                  "is no number",
		"unix:uid=4294967296 viewer":          "is no number",
		"unix:user=no-such-user viewer":       "there is no user",
		"unix:group=no-such-group viewer":     "there is no group",
		"unix:pid=1 viewer":                   "none of unix:uid=",
		"ada viewer":                          "is no subject",
		"cert:dns= viewer":                    "is no subject",
		"cert:email=a viewer":                 "is no subject",
		"token:ci viewer":                     "is no subject",
		"insecure boss":                       "none of the roles",
		"insecure workspace":                  "none of the roles", // the daemon's to give
		"insecure viewer+":                    "none of the roles",
		"insecure admin name=a":               "never for some",
		"insecure viewer+admin label=a=b":     "never for some",
		"insecure viewer name=a name=b":       "only one name",
		"insecure viewer name=*":              "neither a workspace's id",
		"insecure viewer name=A":              "neither a workspace's id",
		"insecure viewer name=a*b":            "neither a workspace's id",
		"insecure viewer label=a":             "is no label",
		"insecure viewer label=A=b":           "is no label",
		"insecure viewer label=a=b label=a=c": "comes twice",
		"insecure viewer team=a":              "neither name= nor label=",
	} {
		if _, err := ParseBindings([]string{line}, 42); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", line, err, want)
		}
	}
}

func TestScopeCovers(t *testing.T) {
	labels := map[string]string{"team": "a", "env": "x"}
	for _, test := range []struct {
		scope  Scope
		target Target
		want   bool
	}{
		{Scope{}, Target{}, true},
		{Scope{}, Target{ID: "w"}, true},
		{Scope{Workspaces: "w"}, Target{ID: "w"}, true},
		{Scope{Workspaces: "w"}, Target{ID: "w2"}, false},
		{Scope{Workspaces: "w"}, Target{}, false},
		{Scope{Workspaces: "w*"}, Target{ID: "w2"}, true},
		{Scope{Workspaces: "w*"}, Target{ID: "v"}, false},
		{Scope{Workspaces: "w*"}, Target{}, false},
		{Scope{Labels: map[string]string{"team": "a"}}, Target{"w", labels}, true},
		{Scope{Labels: map[string]string{"team": "a", "env": "y"}}, Target{"w", labels}, false},
		{Scope{Labels: map[string]string{"none": ""}}, Target{"w", labels}, false},
		{Scope{Labels: map[string]string{"team": "a"}}, Target{"", labels}, false},
		{Scope{Workspaces: "v*", Labels: map[string]string{"team": "a"}}, Target{"w", labels}, false},
		{Scope{Workspaces: "w", Labels: map[string]string{"team": "a"}}, Target{"w", labels}, true},
	} {
		if got := test.scope.Covers(test.target); got != test.want {
			t.Errorf("%+v covers %+v: %v", test.scope, test.target, got)
		}
	}
}
