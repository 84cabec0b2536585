package access

import (
	"errors"
	"fmt"
	"os/user"
	"regexp"
	"slices"
	"strconv"
	"strings"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Binding gives roles to a subject that the daemon's configuration names:
//
//	SUBJECT ROLE[+ROLE...] [name=ID-OR-PREFIX*] [label=KEY=VALUE]...
//
// The subjects are
//
//	unix:uid=1000, unix:user=ada       who connects to the unix socket as that user
//	unix:gid=1000, unix:group=ops      … and is in that group
//	unix:socket-group                  … and is in the group that may use the socket
//	cert:spiffe://example.org/ci       whose certificate has that SPIFFE id
//	cert:dns=ci.example.org            … or that DNS name
//	cert:cn=ci                         … or that common name
//	insecure                           who connects by TCP in plain text
type Binding struct {
	// Identity is one that a connection can have, in the form that Bindings.Grants
	// is asked with: users and groups are numbers.
	Identity string
	Grant    Grant
}

// The identities of connections.
const (
	// IdentityInsecure is that of a connection by TCP in plain text.
	IdentityInsecure = "insecure"
	socketGroup      = "unix:socket-group"
)

func uidIdentity(uid uint32) string { return "unix:uid=" + strconv.FormatUint(uint64(uid), 10) }
func gidIdentity(gid uint32) string { return "unix:gid=" + strconv.FormatUint(uint64(gid), 10) }

// Bindings are all of them. Root is always an admin, named or not: who is root on
// the machine can have everything without asking us.
type Bindings []Binding

// ParseBindings parses bindings, one a line, and resolves users and groups now.
// SocketGID is what unix:socket-group means.
func ParseBindings(lines []string, socketGID uint32) (Bindings, error) {
	bindings := Bindings{{Identity: uidIdentity(0), Grant: Grant{Roles: RolesOf(workspacev1.Role_ROLE_ADMIN)}}}
	for _, line := range lines {
		b, err := parseBinding(line, socketGID)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		bindings = append(bindings, b)
	}
	return bindings, nil
}

func parseBinding(line string, socketGID uint32) (b Binding, err error) {
	words := strings.Fields(line)
	if len(words) < 2 {
		return b, errors.New("must be a subject and its roles, like `unix:group=ops operator+secret-writer label=team=a`")
	}
	if b.Identity, err = parseIdentity(words[0], socketGID); err != nil {
		return b, err
	}
	for name := range strings.SplitSeq(words[1], "+") {
		role, err := parseRole(name)
		if err != nil {
			return b, err
		}
		b.Grant.Roles |= RolesOf(role)
	}
	for _, word := range words[2:] {
		if err := b.Grant.Scope.parse(word); err != nil {
			return b, err
		}
	}
	return b, b.Grant.Check()
}

// Check refuses what makes no sense.
func (g *Grant) Check() error {
	if g.Roles&RolesOf(workspacev1.Role_ROLE_ADMIN) != 0 && !g.Scope.All() {
		return errors.New("the role admin is never for some workspaces only")
	}
	return nil
}

var (
	workspacesForm = regexp.MustCompile(`^([a-z]([a-z0-9-]{0,61}[a-z0-9])?|[a-z][a-z0-9-]{0,61}\*)$`)
	labelForm      = regexp.MustCompile(`^[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?$`)
)

func (s *Scope) parse(word string) error {
	if pattern, ok := strings.CutPrefix(word, "name="); ok {
		switch {
		case s.Workspaces != "":
			return errors.New("only one name can be given: make a binding for each")
		case !workspacesForm.MatchString(pattern):
			return fmt.Errorf("%q is neither a workspace's id nor a beginning of ids with a * behind it", pattern)
		}
		s.Workspaces = pattern
		return nil
	}
	if label, ok := strings.CutPrefix(word, "label="); ok {
		key, value, ok := strings.Cut(label, "=")
		_, dup := s.Labels[key]
		switch {
		case !ok || !labelForm.MatchString(key):
			return fmt.Errorf("%q is no label, like label=team=a", word)
		case dup:
			return fmt.Errorf("the label %s comes twice", key)
		}
		if s.Labels == nil {
			s.Labels = make(map[string]string)
		}
		s.Labels[key] = value
		return nil
	}
	return fmt.Errorf("%q is neither name= nor label=", word)
}

func parseIdentity(subject string, socketGID uint32) (string, error) {
	if subject == IdentityInsecure {
		return subject, nil
	}
	if subject == socketGroup {
		return gidIdentity(socketGID), nil
	}
	if name, ok := strings.CutPrefix(subject, "unix:"); ok {
		return parseUnixIdentity(name)
	}
	if name, ok := strings.CutPrefix(subject, "cert:"); ok {
		for _, form := range []string{"spiffe://", "dns=", "cn="} {
			switch rest, ok := strings.CutPrefix(name, form); {
			case !ok || rest == "":
			case form == "dns=":
				return dnsIdentity(rest), nil
			default:
				return subject, nil
			}
		}
	}
	return "", fmt.Errorf("%q is no subject: unix:uid=, unix:user=, unix:gid=, unix:group=, unix:socket-group, cert:spiffe://, cert:dns=, cert:cn= or insecure", subject)
}

func parseUnixIdentity(name string) (string, error) {
	kind, value, _ := strings.Cut(name, "=")
	id := value
	switch kind {
	case "uid", "gid":
	case "user":
		u, err := user.Lookup(value)
		if err != nil {
			return "", fmt.Errorf("there is no user %q", value)
		}
		kind, id = "uid", u.Uid
	case "group":
		g, err := user.LookupGroup(value)
		if err != nil {
			return "", fmt.Errorf("there is no group %q", value)
		}
		kind, id = "gid", g.Gid
	default:
		return "", fmt.Errorf("%q is none of unix:uid=, unix:user=, unix:gid=, unix:group= and unix:socket-group", "unix:"+name)
	}
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return "", fmt.Errorf("%q is no number of a user or group", id)
	}
	if kind == "uid" {
		return uidIdentity(uint32(n)), nil
	}
	return gidIdentity(uint32(n)), nil
}

// Grants are those of somebody who has these identities.
func (bs Bindings) Grants(identities ...string) (grants []Grant) {
	for _, b := range bs {
		if slices.Contains(identities, b.Identity) {
			grants = append(grants, b.Grant)
		}
	}
	return grants
}

// Names reports whether a binding is about an identity of this beginning.
func (bs Bindings) Names(prefix string) bool {
	return slices.ContainsFunc(bs, func(b Binding) bool { return strings.HasPrefix(b.Identity, prefix) })
}
