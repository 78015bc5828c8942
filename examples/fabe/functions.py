"""Small functions, half of them with a loop: what `make_data.py` makes the example's data of."""


def total_price(prices, tax):
    total = sum(prices)
    return total + total * tax


def count_vowels(text):
    count = 0
    for char in text:
        if char in "aeiou":
            count += 1
    return count


def is_even(number):
    return number % 2 == 0


def squares(limit):
    return [n * n for n in range(limit)]


def full_name(first, last):
    return first + " " + last


def factorial(number):
    result = 1
    for i in range(2, number + 1):
        result *= i
    return result


def to_celsius(degrees):
    return (degrees - 32) * 5 / 9


def longest(words):
    best = ""
    for word in words:
        if len(word) > len(best):
            best = word
    return best


def clamp(value, low, high):
    return max(low, min(value, high))


def only_positive(numbers):
    return [n for n in numbers if n > 0]


def last_item(items):
    if not items:
        return None
    return items[-1]


def running_total(numbers):
    total = 0
    sums = []
    for n in numbers:
        total += n
        sums.append(total)
    return sums


def area(radius):
    return 3.14159 * radius**2


def join_lines(lines):
    text = ""
    for line in lines:
        text += line + "\n"
    return text


def greeting(name):
    return "Hello, " + name + "!"


def has_zero(numbers):
    for n in numbers:
        if n == 0:
            return True
    return False


def swap_pair(pair):
    first, second = pair
    return second, first


def digits(text):
    return [int(char) for char in text]


def average(values):
    return sum(values) / len(values)


def countdown(start):
    steps = []
    while start > 0:
        steps.append(start)
        start -= 1
    return steps


def is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def invert(table):
    return {table[key]: key for key in table}


def initials(first, last):
    return first[0] + last[0]


def power(base, exponent):
    result = 1
    for _ in range(exponent):
        result *= base
    return result


def absolute(number):
    if number < 0:
        return -number
    return number


def find_index(items, wanted):
    for index, item in enumerate(items):
        if item == wanted:
            return index
    return -1


def discount(price, percent):
    return price * (100 - percent) / 100


def repeat_words(words, times):
    return [word * times for word in words]


def seconds(hours, minutes):
    return hours * 3600 + minutes * 60


def sum_odd(numbers):
    total = 0
    for n in numbers:
        if n % 2 == 1:
            total += n
    return total


def shout(text):
    return text.upper() + "!"


def gcd(first, second):
    while second:
        first, second = second, first % second
    return first


def distance(left, right):
    return abs(left - right)


def word_lengths(words):
    return [len(word) for word in words]


def is_palindrome(text):
    return text == text[::-1]


def halve_until(number, floor):
    steps = 0
    while number > floor:
        number /= 2
        steps += 1
    return steps


def middle(items):
    return items[len(items) // 2]


def count_item(items, wanted):
    count = 0
    for item in items:
        if item == wanted:
            count += 1
    return count


def grade(points):
    if points >= 50:
        return "pass"
    return "fail"


def strip_all(lines):
    return [line.strip() for line in lines]


def volume(width, height, depth):
    return width * height * depth


def product(numbers):
    result = 1
    for n in numbers:
        result *= n
    return result


def first_word(text):
    return text.split()[0]


def evens(limit):
    return [n for n in range(limit) if n % 2 == 0]


def perimeter(width, height):
    return 2 * (width + height)


def smallest(numbers):
    low = numbers[0]
    for n in numbers:
        if n < low:
            low = n
    return low


def sign(number):
    if number > 0:
        return 1
    return -1


def fibonacci(count):
    a, b = 0, 1
    for _ in range(count):
        a, b = b, a + b
    return a


def is_adult(age):
    return age >= 18


def flatten(rows):
    return [cell for row in rows for cell in row]


def percent(part, whole):
    return 100 * part / whole


def remove_item(items, unwanted):
    kept = list(items)
    while unwanted in kept:
        kept.remove(unwanted)
    return kept


def file_ending(path):
    return path.split(".")[-1]


def add_vectors(left, right):
    return [a + b for a, b in zip(left, right)]


def round_up(number, step):
    return (number + step - 1) // step * step


def reverse_words(text):
    words = []
    for word in text.split():
        words.insert(0, word)
    return " ".join(words)
